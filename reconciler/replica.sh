# One replica: start the engine, say where it is, drain when told, end as the engine ends.
# The lines above set: comment_base names program image_cache weights launch arguments environment contained
# node_count drain_timeout_s secrets keys tls_name
#
# A replica of several nodes is one engine with a rank on each. The batch script runs rank 0, which
# alone has an address; srun runs this same script once more on every other node, as
# `rank MASTER_ADDRESS MASTER_PORT`. All or nothing: the first rank that ends ends the job.
# shellcheck shell=bash disable=SC2154,SC2317
set -u

# Below the range that Linux gives to outgoing connections (32768 and up).
readonly first_port=20000 last_port=29999
# How often a lost port is replaced by another before giving up.
readonly port_tries=5
# What the planner tells apart from the engine's own failures (reconciler/state.py, sysexits.h).
readonly exit_no_weights=66 exit_no_program=69 exit_node=71 exit_no_keys=77

trap_ready=false ready=null draining=false address='' engine='' publisher=''
clock='' overdue=false scratch='' rank=0 others='' master='' master_port='' speaker=''

say() { printf '%(%F %T)T fleet: %s%s\n' -1 "$speaker" "$*"; }

# The address that others reach this node by: what Slurm itself uses, else the host's first one.
node_address() {
  local name
  name=$(scontrol show node "$SLURMD_NODENAME" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  {
    getent ahostsv4 "${name:-$SLURMD_NODENAME}" | cut -d' ' -f1
    hostname -I | tr ' ' '\n'
  } | grep -v '^127\.' | grep -E -m1 '^[0-9]+\.[0-9.]+$'
}

comment() {
  printf '%s,"run":{"node":"%s","restarts":%d,"address":"%s","trap_ready":%s,"ready":%s,"draining":%s}}' \
    "$comment_base" "$SLURMD_NODENAME" "${SLURM_RESTART_COUNT:-0}" "$address" "$trap_ready" "$ready" "$draining"
}

# Publish what is true now; slurmctld may be busy or down for minutes, so it is retried aside.
# Only the newest publication lives: an older one must not overwrite it.
publish() {
  local text
  text=$(comment)
  stop_publishing
  (
    trap - USR1 TERM EXIT
    until timeout 10 scontrol update jobid="$SLURM_JOB_ID" comment="$text" >/dev/null 2>&1; do sleep 2; done
  ) &
  publisher=$!
}

stop_publishing() {
  [[ -z $publisher ]] || { kill "$publisher" && wait "$publisher"; } 2>/dev/null
  publisher=''
}

# True if something on this node listens on the port (any address, IPv4 or IPv6).
listens() {
  local hex
  printf -v hex ':%04X' "$1"
  cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk -v port="$hex" \
    '$4 == "0A" && substr($2, length($2) - 4) == port { found = 1 } END { exit !found }'
}

# Choose a port that nobody listens on and no other replica on this node has reserved. The lock is
# held as long as this script runs, so two replicas never choose the same one.
choose_port() {
  local span=$((last_port - first_port + 1)) offset locks="${TMPDIR:-/tmp}/fleet-ports-$UID"
  mkdir -m 700 "$locks" 2>/dev/null
  # A folder that another user made would let them hold our locks, or point them at our files.
  [[ -O $locks && -d $locks && ! -L $locks ]] || { say "$locks is not ours; remove it"; return 1; }
  for ((offset = 0; offset < span; offset++)); do
    port=$((first_port + (SLURM_JOB_ID * 7 + tried + offset) % span))
    listens "$port" && continue
    exec {port_lock}>"$locks/$port" || continue
    flock -n "$port_lock" && return 0
    exec {port_lock}>&-
  done
  say "no free port between $first_port and $last_port on $SLURMD_NODENAME"
  return 1
}

# The engine's environment, set only in the subshell that becomes the engine: a name from the spec
# must not change this script's variables. A container starts from an empty one, and what it may see
# goes in by name, never as an argument, which every user of the node could read.
set_environment() {
  prefix=''
  if $contained; then
    prefix=APPTAINERENV_
    APPTAINERENV_USER=$(id -un)
    export APPTAINERENV_USER APPTAINERENV_CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-}"
    export APPTAINERENV_HOME=/tmp APPTAINERENV_XDG_CACHE_HOME=/tmp/cache
    export APPTAINERENV_TRITON_CACHE_DIR=/tmp/triton APPTAINERENV_TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
  fi
  # Without it vLLM asks the default route which address is its own, and a node may have none.
  ((node_count == 1)) || export "${prefix}VLLM_HOST_IP=$node"
  # One of them may be called as a variable of this script, which are not needed any more.
  set -- "${environment[@]/#/$prefix}"
  while (($#)); do unset -v "${1%%=*}"; export "${1?}"; shift; done
}

# Start this node's rank of the engine, with further words for its command line.
start_rank() {
  local command=("${launch[@]}" "${arguments[@]}" "$@")
  if ((node_count > 1)); then
    command+=(--nnodes "$node_count" --node-rank "$rank")
    command+=(--master-addr "$master" --master-port "$master_port")
  fi
  (
    trap - USR1 USR2 TERM EXIT
    set -- "${command[@]}"
    set_environment
    exec "$@"
  ) &
  engine=$!
}

# Copy the certificate and the keys to where the engine finds them and no other user looks. What they
# are never becomes an argument or a part of an environment: any user of the node could read those.
take_secrets() {
  local id key list=''
  mkdir -p "$private" && cp "$secrets/models/${names[0]}.pem" "$private/replica.pem" || return 1
  for id in "${keys[@]}"; do
    # One that was revoked since is gone.
    key=$(cat "$secrets/keys/"*".$id") && list+="${list:+, }\"$key\""
  done
  [[ -n $list ]] && printf 'api-key: [%s]\n' "$list" >"$private/engine.yaml"
} 2>/dev/null

start_engine() {
  if ((node_count > 1)); then
    choose_port || exit "$exit_node"
    master=$node master_port=$port
  fi
  choose_port || exit "$exit_node"
  address="$node:$port"
  say "engine starts on $address"
  local words=(--host "$node" --port "$port")
  health=("http://$address/health")
  if [[ -n $secrets ]]; then
    words+=(--config "$seen/engine.yaml")
    words+=(--ssl-certfile "$seen/replica.pem" --ssl-keyfile "$seen/replica.pem")
    # The certificate comes with that of who signed it.
    health=(--cacert "$private/replica.pem" --resolve "$tls_name:$port:$node")
    health+=("https://$tls_name:$port/health")
  fi
  start_rank "${words[@]}" --served-model-name "${names[@]}" "${names[0]}@$SLURM_JOB_ID"
  ((node_count == 1)) || start_others
  publish
}

# Start the other ranks, each on a node of its own. They read this script from stdin, as no other
# node has Slurm's copy of it, and its variables must not become arguments, which anyone could read.
start_others() {
  local count=$((node_count - 1))
  (
    trap - USR1 USR2 TERM EXIT
    exec srun --relative=1 --nodes="$count" --ntasks="$count" --ntasks-per-node=1 \
      --cpus-per-task="$SLURM_CPUS_PER_TASK" --mpi=none --kill-on-bad-exit=1 --input=all \
      bash -s rank "$master" "$master_port" <"$0"
  ) &
  others=$!
}

# For another start; at the job's end Slurm tells them. srun passes the signal on.
stop_others() {
  [[ -z $others ]] || { kill -USR1 "$others" && wait "$others"; } 2>/dev/null
  others=''
}

# The life of another rank than 0. Its status becomes the job's, unless it was told to end. vLLM's
# outlives rank 0, and takes its time to heed a TERM: it is killed.
run_rank() {
  rank=$((SLURM_PROCID + 1)) master=$1 master_port=$2 speaker="$SLURMD_NODENAME: "
  trap 'exit 0' USR1 TERM
  prepare_node
  say "rank $rank starts"
  start_rank --headless
  wait "$engine"
  local status=$?
  say "rank $rank ended with status $status"
  # With 0, srun would wait for the others, and they for this one.
  exit $((status == 0 ? 1 : status))
}

# Whether all that the script has started still runs.
lives() {
  { kill -0 "$engine" && { [[ -z $others ]] || kill -0 "$others"; }; } 2>/dev/null
}

answers() {
  curl --silent --fail --max-time 2 --noproxy '*' --output /dev/null "${health[@]}" 2>/dev/null
}

# USR1: publish `draining` first, so that nobody routes here or counts on this job, then let the
# engine's API process finish. Its children get no signal: that would cut the streams in flight.
drain() {
  $draining && return
  draining=true
  say "draining"
  stop_publishing
  timeout 10 scontrol update jobid="$SLURM_JOB_ID" comment="$(comment)" >/dev/null 2>&1 || publish
  [[ -n $engine ]] || exit 0
  kill -TERM "$engine" 2>/dev/null
  # vLLM has been seen to stay long after its own shutdown timeout, for a client that never left.
  {
    trap - USR1 TERM EXIT
    sleep "$drain_timeout_s" &
    nap=$!
    trap 'kill "$nap"; exit' TERM
    wait "$nap"
    kill -USR2 $$
  } &
  clock=$!
}

# Make this node's scratch folder, find its address, and end here if it lacks what an engine needs.
prepare_node() {
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/fleet-$SLURM_JOB_ID.XXXXXX") || exit "$exit_node"
  launch=("${launch[@]/#@SCRATCH@/$scratch}")
  node=$(node_address)
  if [[ -z $node ]]; then
    say "this node has no address that others could reach"
    exit "$exit_node"
  fi
  if ! [[ -e $program ]]; then
    say "$program is not on this node: provision the image"
    exit "$exit_no_program"
  fi
  if ! [[ -e $weights ]]; then
    say "$weights is not on this node: provision the weights"
    exit "$exit_no_weights"
  fi
  [[ -z $image_cache ]] || use_copy || say "$image_cache can't be used: the image runs from $program"
}

# Run the image from this node's own disk: the first job that needs it there copies it, and takes away
# those that no job runs. Where that can't be done, it runs from where it is.
use_copy() {
  local copy="$image_cache/${program##*/}" other other_lock word
  (umask 077 && mkdir -p "$image_cache")
  # A folder that another user made would let them say what runs here.
  [[ -O $image_cache && -d $image_cache && ! -L $image_cache ]] || return 1
  exec {image_lock}>"$copy.lock" && flock "$image_lock" || return 1
  if ! [[ -e $copy ]]; then
    for other in "$image_cache"/*.sif; do
      [[ -e $other ]] || continue
      # Each job that runs one has it locked.
      exec {other_lock}>"$other.lock" && flock -n "$other_lock" && rm -f "$other"
      exec {other_lock}>&-
    done
    { cp "$program" "$copy.part" && mv "$copy.part" "$copy"; } || rm -f "$copy.part"
  fi
  flock --shared "$image_lock"
  # Until then it could still be taken away.
  [[ -e $copy ]] || return 1
  for word in "${!launch[@]}"; do
    [[ ${launch[word]} != "$program" ]] || launch[word]=$copy
  done
  say "the image runs from $copy"
}

# Not every site's Slurm finds a process whose parent has gone, so nothing is left for it to find.
clean_up() {
  stop_publishing
  [[ -z $clock ]] || kill "$clock"
  [[ -z $engine ]] || kill -KILL "$engine"
  rm -rf "$scratch"
} 2>/dev/null

trap clean_up EXIT
[[ ${1:-} != rank ]] || run_rank "$2" "$3"

# TERM comes to every process of the job at once (scancel, walltime): only wait for the engine.
trap 'say "told to end"; draining=true' TERM
trap drain USR1
trap 'say "drain timeout"; overdue=true' USR2
trap_ready=true

prepare_node
if [[ -n $secrets ]]; then
  private=$scratch/tmp/fleet seen=$scratch/tmp/fleet
  # Of the scratch a container sees this, as its /tmp.
  $contained && seen=/tmp/fleet
  if ! (umask 077 && take_secrets); then
    say "$secrets can't be read on this node, or lacks this replica's keys or certificate"
    exit "$exit_no_keys"
  fi
fi
tried=0
start_engine
while true; do
  # Past the drain timeout the script ends, and Slurm ends whatever of the job is left.
  while ! $overdue && lives; do
    if [[ $ready == null ]] && ! $draining && answers; then
      printf -v ready '%(%s)T' -1
      say "engine ready"
      publish
    elif [[ $ready == null || -n $others ]]; then
      # Before 4.3 bash can't wait for whichever of two ends first.
      sleep 1 &
      wait $!
    else
      wait "$engine"
    fi
  done
  $overdue && exit 1
  if kill -0 "$engine" 2>/dev/null; then
    wait "$others"
    status=$?
    say "another rank ended, with status $status"
    exit $((status == 0 ? 1 : status))
  fi
  wait "$engine"
  status=$?
  # Someone else took the port between the choice and the bind: choose another.
  if [[ $ready == null ]] && ! $draining && listens "$port" && ((++tried < port_tries)); then
    say "port $port was taken by another process"
    stop_others
    start_engine
    continue
  fi
  break
done
say "engine ended with status $status"
exit "$status"
