# Run on a gateway by `sh -c`: FOLDER STATUS_ADDRESS look | change GENERATION (files as tar on stdin)
#   | log MARK_BYTES MARK OFFSET SINCE MOST
# shellcheck shell=sh
set -eu
folder=$1 status=$2 verb=$3
# A login by ssh often lacks the folders where nginx and pgrep are. Without root, NGINX is in its own.
PATH=$folder/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin
conf=$folder/current/nginx.conf

# The generation that answers; it names a folder, so anything but a hash counts as no answer.
running() {
  curl --silent --max-time 2 --max-filesize 64 --noproxy '*' "http://$status/generation" 2>/dev/null |
    grep -Ex '[0-9a-f]{12}' || true
}

# Which generation a start of nginx would read.
linked() {
  link=$(readlink "$folder/current") || link=none
  echo "${link##*gen-}"
}

case $verb in
look)
  if ! master=$(cat "$folder/nginx.pid" 2>/dev/null) || ! kill -0 "$master" 2>/dev/null; then
    echo "nginx is not running" >&2
    exit 1
  fi
  generation=$(running)
  if [ -z "$generation" ] && [ -e "$folder/current/targets.json" ]; then
    # It has routes and does not say which: that is unknown, not "no routes".
    echo "nginx does not answer on $status" >&2
    exit 1
  fi
  # Workers that still finish requests of an earlier configuration show as shutting down.
  echo "${generation:-none} $(linked) $(pgrep -c -P "$master" -f 'shutting down' || true)"
  if [ -n "$generation" ]; then cat "$folder/gen-$generation/targets.json"; fi
  ;;
change)
  generation=$4
  staged=$folder/gen-$generation
  # Another host's change comes before or after this one.
  exec 9<"$folder"
  flock -w 10 9 || {
    echo "another change of $folder is under way" >&2
    exit 1
  }
  part=$(mktemp -d "$folder/part.XXXXXX")
  trap 'rm -rf "$part"' EXIT
  tar -x -C "$part" -f -
  ln -s ../base.conf "$part/nginx.conf"
  # Before 1.25.1 HTTP/2 is a word of `listen`, which later ones warn of.
  if grep -q '^ *http2 on;$' "$part/fleet.conf" &&
    nginx -v 2>&1 | grep -qE '/1\.(1[0-9]|2[0-4])\.|/1\.25\.0'; then
    sed -i -e '/^ *http2 on;$/d' -e 's/^\( *listen .* ssl\);$/\1 http2;/' "$part/fleet.conf"
  fi
  # Its usual log may be root's; without the word the first that it says is a complaint of that.
  nginx -t -q -e stderr -c "$part/nginx.conf"
  before=$(running)
  previous=$(readlink "$folder/current" || true)
  # A folder of that name holds the same files (its name is their hash), but for a key: old ones are
  # removed.
  if [ ! -d "$staged" ]; then
    mv "$part" "$staged"
  elif [ -e "$part/replica-key.conf" ]; then
    mv "$part/replica-key.conf" "$staged/"
  fi
  rm -f "$staged/closing"
  ln -sfn "gen-$generation" "$folder/current.part.$$"
  mv -T "$folder/current.part.$$" "$folder/current"
  if [ -n "$before" ] && [ "$before" != "$generation" ]; then
    # From now on answers end their connections (answer.lua): half a second later who asks again
    # and again has none left that the reload could close.
    touch "$folder/gen-$before/closing" || true # somebody has removed the folder
    sleep 0.5
  fi
  nginx -s reload -c "$conf"
  # The new workers answer within moments; until then the old generation may.
  # One answer of theirs counts: an old worker may still take the next question.
  tries=0
  answer=$(running)
  while [ "$answer" != "$generation" ] && [ "$tries" -lt 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
    answer=$(running)
  done
  if [ "$answer" != "$generation" ]; then
    rm -f "$folder/gen-$before/closing"
    # What runs must match what a restart would read: put the old link back.
    if [ -n "$previous" ]; then
      ln -sfn "$previous" "$folder/current.part.$$"
      mv -T "$folder/current.part.$$" "$folder/current"
    else
      rm "$folder/current"
    fi
  else
    find "$folder" -mindepth 2 -maxdepth 2 -name replica-key.conf ! -path "$staged/*" -delete
  fi
  # Keep the last few generations to look at; nginx has read the files and needs none of them.
  find "$folder" -maxdepth 1 -name 'gen-*' ! -name "gen-$generation" ! -name "${previous##*/}" \
    -printf '%T@ %p\n' | sort -rn | tail -n +6 | cut -d' ' -f2- | xargs -r -d '\n' rm -rf
  # What a change leaves that was killed; any that still runs is younger.
  find "$folder" -maxdepth 1 -name '*part.*' -mmin +60 -exec rm -rf {} +
  echo "$answer"
  ;;
log)
  # MARK_BYTES MARK OFFSET SINCE MOST: where the last read ended; no bytes means never.
  mark_bytes=$4 mark=$5 offset=$6 since=$7 most=$8
  current=$folder/access.log
  # A file is known by its beginning, whatever a rotation renames or copies it to.
  is_marked() {
    [ "$mark_bytes" -gt 0 ] &&
      [ "$(head -c "$mark_bytes" "$1" | sha256sum | cut -c1-16)" = "$mark" ]
  }
  # What NGINX may still write to a rotated file it has written long before this.
  is_settled() { [ "$1" != "$current" ] && [ "$(($(date +%s) - $(stat -c %Z "$1")))" -gt 10 ]; }
  readable() {
    [ -r "$1" ] || {
      echo "$1 can't be read" >&2
      exit 1
    }
  }
  readable "$folder"
  rotated=$(find "$folder" -maxdepth 1 -name 'access.log[.-]*' ! -name '*.gz' ! -name '*.xz' \
    ! -name '*.bz2' ! -name '*.zst' -type f -printf '%T@ %p\n' | sort -n | cut -d' ' -f2-)
  state=same
  file=
  newer=
  IFS='
'
  # The newest that is marked, and those after it. While one is copied there are two of it.
  for one in $rotated "$current"; do
    [ -f "$one" ] || continue
    readable "$one"
    if is_marked "$one"; then
      file=$one newer=
    elif [ -n "$file" ] && [ -s "$one" ]; then
      newer="$newer$one
"
    fi
  done
  if [ -z "$file" ]; then
    state=first
    if [ "$mark_bytes" -gt 0 ]; then state=gone; fi
    offset=0
    for one in $rotated "$current"; do
      if [ -s "$one" ] && [ -n "$(find "$one" -newermt "@$since")" ]; then
        if [ -z "$file" ]; then file=$one; else newer=$one; fi
      fi
    done
  elif [ -n "$newer" ] && [ "$(stat -c %s "$file")" -eq "$offset" ] && is_settled "$file"; then
    state=next
    file=${newer%%"$IFS"*}
    newer=${newer#*"$IFS"}
    offset=0
  fi
  if [ -z "$file" ]; then
    echo "$state 0 0 $since end"
    exit
  fi
  left=end
  if [ -n "$newer" ]; then
    left=newer
    if is_settled "$file"; then left=settled; fi
  fi
  echo "$state $offset $(stat -c '%s %.9Y' "$file") $left"
  tail -c "+$((offset + 1))" "$file" | head -c "$most"
  ;;
esac
