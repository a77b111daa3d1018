# Run on a gateway by `sh -c`: FOLDER STATUS_ADDRESS look | change GENERATION (files as tar on stdin)
# shellcheck shell=sh
set -eu
folder=$1 status=$2 verb=$3
# A login by ssh often lacks the folders where nginx and pgrep are.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
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
  part=$(mktemp -d "$folder/part.XXXXXX")
  trap 'rm -rf "$part"' EXIT
  tar -x -C "$part" -f -
  ln -s ../base.conf "$part/nginx.conf"
  nginx -t -q -c "$part/nginx.conf"
  previous=$(readlink "$folder/current" || true)
  # A folder of that name holds the same files: its name is their hash.
  [ -d "$staged" ] || mv "$part" "$staged"
  ln -sfn "gen-$generation" "$folder/current.part.$$"
  mv -T "$folder/current.part.$$" "$folder/current"
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
    # What runs must match what a restart would read: put the old link back.
    if [ -n "$previous" ]; then
      ln -sfn "$previous" "$folder/current.part.$$"
      mv -T "$folder/current.part.$$" "$folder/current"
    else
      rm "$folder/current"
    fi
  fi
  # Keep the last few generations to look at; nginx has read the files and needs none of them.
  find "$folder" -maxdepth 1 -name 'gen-*' ! -name "gen-$generation" ! -name "${previous##*/}" \
    -printf '%T@ %p\n' | sort -rn | tail -n +6 | cut -d' ' -f2- | xargs -r -d '\n' rm -rf
  # What a change leaves that was killed; any that still runs is younger.
  find "$folder" -maxdepth 1 -name '*part.*' -mmin +60 -exec rm -rf {} +
  echo "$answer"
  ;;
esac
