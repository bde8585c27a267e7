#!/usr/bin/env bash
# A throw-away real Slurm cluster on one Linux host, for tests.
#
# Starts munged + slurmctld + N slurmd ("nodes" n1..nN) from Debian's packages, without
# systemd and without cgroups, under one private directory. Each node runs in its own
# PID/UTS/mount namespace when possible, so that it has its own hostname (n1, n2 ...), a private
# /etc/hosts in which all node names resolve, and can be "powered off" by killing ONE process.
# Only processes recorded at start (pid + kernel start time) are ever signalled.
#
#   cluster.sh start | stop | status | env | logs
#   cluster.sh kill-node nX     power loss: daemon, steps and tasks vanish at once
#   cluster.sh kill-slurmd nX   only the node's daemon dies, its tasks live on
#   cluster.sh freeze-node nX | thaw-node nX    hung node (SIGSTOP / SIGCONT)
#   cluster.sh start-node nX    (re)start a node that is off, or its daemon
#   cluster.sh stop-controller | start-controller     controller outage (state is kept)
#   eval "$(cluster.sh env)"    then: sinfo, srun, sbatch, squeue, scancel ...
#
# Settings (environment; only read by `start`):
#   CLUSTER_DIR=DIR (no default: everything is written below it)  CLUSTER_NODES=2
#   CLUSTER_CPUS=8  CLUSTER_MEM_MB=8000  CLUSTER_GPUS=8
#   CLUSTER_PORT=26817   controller port; nodes use CLUSTER_PORT+1 .. CLUSTER_PORT+N
#   CLUSTER_FIRST_JOB=1  number of the first job: jobs of two clusters on one host need other numbers where they
#       make the port of their ranks from it
#   CLUSTER_PARTITIONS="test:UNLIMITED short:30"   name:max-minutes ...; the first is the default.
#       Always there too: `low`, whose jobs are preempted (10 s grace, then requeued) by those in `high`
#   CLUSTER_ISOLATE=auto|yes|no       namespaces per node
#   CLUSTER_KILLWAIT=5   seconds from SIGTERM to SIGKILL (time limit, scancel, requeue)
#   CLUSTER_REQUEUE_DELAY=5   seconds a requeued job waits (AuthInfo cred_expire; Slurm's default: 120)
#   CLUSTER_SLURMD_TIMEOUT=10 seconds until a silent node is marked DOWN
set -euo pipefail

CLUSTER_DIR=${CLUSTER_DIR:?set it to a directory for the cluster}
CONF=$CLUSTER_DIR/slurm.conf
export SLURM_CONF=$CONF

die() { echo "cluster.sh: $*" >&2; exit 1; }
say() { echo "cluster.sh: $*" >&2; }

# ---- processes: one file per process, holding "pid starttime" ---------------------------------
stat_of() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; set -- $s; echo "$1 ${20}"; }  # state, start time
record() { local st; st=$(stat_of "$2") || die "$1 did not start (see $CLUSTER_DIR/log)"; echo "$2 ${st#* }" >"$CLUSTER_DIR/pids/$1"; }
pid_of() {   # prints the recorded pid if that very process is still running
  local pid st now; [ -s "$CLUSTER_DIR/pids/$1" ] && read -r pid st <"$CLUSTER_DIR/pids/$1" || return 1
  now=$(stat_of "$pid") || return 1
  [ "${now#* }" = "$st" ] && [ "${now% *}" != Z ] && echo "$pid"
}
end() {      # end NAME [SIGNAL [PID]]: signal the recorded process (or PID), SIGKILL after 5 s, forget it
  local pid i; pid=$(pid_of "$1") && {
    kill -s "${2:-TERM}" "${3:-$pid}" 2>/dev/null || true
    kill -s CONT "${3:-$pid}" 2>/dev/null || true
    for i in $(seq 100); do pid_of "$1" >/dev/null || break; sleep 0.05; done
    ! pid_of "$1" >/dev/null || { kill -s KILL "$pid" 2>/dev/null || true; sleep 0.1; }
  }
  rm -f "$CLUSTER_DIR/pids/$1"
}
wait_for() { local what=$1 secs=$2; shift 2; local i
  for i in $(seq $((secs * 20))); do
    "$@" && return 0
    [ ! -e "$CLUSTER_DIR/pids/$what" ] || pid_of "$what" >/dev/null || break
    sleep 0.05
  done
  tail -n 5 "$CLUSTER_DIR"/log/slurmctld.* >&2 || true; die "no $what (see $CLUSTER_DIR/log)"; }
children() { cat "/proc/$1/task/$1/children" 2>/dev/null; }

# ---- install ----------------------------------------------------------------------------------
install_packages() {
  [ -x /usr/sbin/munged ] && command -v slurmctld slurmd sbatch >/dev/null && return 0
  [ "$(id -u)" = 0 ] || die "Slurm is not installed and I am not root"
  say "installing slurmctld slurmd slurm-client munge"
  local log; log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -q update && apt-get -q install -y --no-install-recommends \
      slurmctld slurmd slurm-client munge; } >"$log" 2>&1 || { cat "$log" >&2; die "install failed"; }
  rm -f "$log"
}

# ---- configure --------------------------------------------------------------------------------
configure() {
  local n=${CLUSTER_NODES:-2} port=${CLUSTER_PORT:-26817} gpus=${CLUSTER_GPUS:-8} i p first=YES
  mkdir -p "$CLUSTER_DIR"/{pids,log,run,state,spool,dev}; chmod 755 "$CLUSTER_DIR"
  [ -s "$CLUSTER_DIR/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$CLUSTER_DIR/munge.key")
  : >"$CLUSTER_DIR/gres.conf"
  if [ "$gpus" -gt 0 ]; then   # fake GPUs: clones of /dev/null (count-only GPUs are refused by 22.05)
    for ((i = 0; i < gpus; i++)); do [ -c "$CLUSTER_DIR/dev/gpu$i" ] || mknod -m 666 "$CLUSTER_DIR/dev/gpu$i" c 1 3; done
    echo "NodeName=n[1-$n] Name=gpu File=$CLUSTER_DIR/dev/gpu[0-$((gpus - 1))]" >"$CLUSTER_DIR/gres.conf"
  fi
  { echo "127.0.0.1 localhost $(hostname)"
    for ((i = 1; i <= n; i++)); do echo "127.0.1.$i n$i"; done; } >"$CLUSTER_DIR/hosts"
  { cat <<EOF
ClusterName=test
FirstJobId=${CLUSTER_FIRST_JOB:-1}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$CLUSTER_DIR/run/munge.sock,cred_expire=${CLUSTER_REQUEUE_DELAY:-5}
StateSaveLocation=$CLUSTER_DIR/state
SlurmdSpoolDir=$CLUSTER_DIR/spool/%n
SlurmctldPidFile=$CLUSTER_DIR/run/slurmctld.pid
SlurmdPidFile=$CLUSTER_DIR/run/slurmd-%n.pid
SlurmctldLogFile=$CLUSTER_DIR/log/slurmctld.log
SlurmdLogFile=$CLUSTER_DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$CLUSTER_DIR/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=${CLUSTER_SLURMD_TIMEOUT:-10}
SlurmctldTimeout=10
KillWait=${CLUSTER_KILLWAIT:-5}
UnkillableStepTimeout=120
InactiveLimit=0
MinJobAge=3600
PropagateResourceLimits=NONE
EOF
    # A node answers "end that step" once its tasks are dead, up to KillWait later. An answer that comes after
    # MessageTimeout (10 s unless set) counts as none: the controller asks again a minute later, and by then the step of
    # that number may be the one of the job's next generation, which is ended in its place.
    echo "MessageTimeout=$((${CLUSTER_KILLWAIT:-5} + 10))"
    [ "$gpus" -le 0 ] || echo "GresTypes=gpu"
    for ((i = 1; i <= n; i++)); do
      echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.1.$i Port=$((port + i)) CPUs=${CLUSTER_CPUS:-8}" \
        "RealMemory=${CLUSTER_MEM_MB:-8000} $([ "$gpus" -le 0 ] || echo "Gres=gpu:$gpus ")State=UNKNOWN"
    done
    for p in ${CLUSTER_PARTITIONS:-test:UNLIMITED short:30}; do
      echo "PartitionName=${p%%:*} Nodes=ALL Default=$first MaxTime=${p##*:} PriorityTier=5 PreemptMode=OFF State=UP"; first=NO
    done
    echo "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=10 State=UP"
    echo "PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP"; } >"$CONF"
  # pid 1 of a node: gives it its name and hosts file, runs the daemon, reaps orphans, outlives the daemon
  cat >"$CLUSTER_DIR/node-init" <<'EOF'
#!/bin/bash
# node-init NAME DIR ISOLATED
if [ "$3" = yes ]; then hostname "$1"; mount --bind "$2/hosts" /etc/hosts; fi
up() { slurmd -D -f "$2/slurm.conf" -N "$1" & }
trap 'up "$@"' USR1                       # start-node: bring the daemon back
trap 'exit 0' TERM INT                    # as pid 1 of a namespace this ends everything in it
up "$@"
while :; do wait -n; sleep 0.2; done
EOF
  chmod 755 "$CLUSTER_DIR/node-init"
  local iso=${CLUSTER_ISOLATE:-auto}
  if [ "$iso" = auto ]; then
    iso=no; unshare --uts --pid --fork --mount-proc --kill-child hostname n1 2>/dev/null && iso=yes
  fi
  echo "$iso" >"$CLUSTER_DIR/isolated"
}

# ---- nodes ------------------------------------------------------------------------------------
nodes() { sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$CONF"; }
isolated() { [ "$(cat "$CLUSTER_DIR/isolated")" = yes ]; }
node_init() { local pid; pid=$(pid_of "node-$1") || return 1; isolated || { echo "$pid"; return; }; children "$pid" | cut -d' ' -f1 | grep .; }
node_slurmd() { local i c; i=$(node_init "$1") || return 1
  for c in $(children "$i"); do [ "$(cat "/proc/$c/comm" 2>/dev/null)" != slurmd ] || { echo "$c"; return 0; }; done; return 1; }
start_node() {
  local n=$1 wrap=()
  nodes | grep -qx "$n" || die "no node $n"
  if pid_of "node-$n" >/dev/null; then
    node_slurmd "$n" >/dev/null || kill -s USR1 "$(node_init "$n")"
    return 0
  fi
  ! isolated || wrap=(unshare --uts --pid --fork --mount-proc --kill-child)
  mkdir -p "$CLUSTER_DIR/spool/$n"; rm -f "$CLUSTER_DIR/run/slurmd-$n.pid"
  setsid ${wrap[@]+"${wrap[@]}"} "$CLUSTER_DIR/node-init" "$n" "$CLUSTER_DIR" "$(cat "$CLUSTER_DIR/isolated")" \
    </dev/null >>"$CLUSTER_DIR/log/node-$n.out" 2>&1 9>&- &
  record "node-$n" $!
}
kill_node() { # power loss
  local n=$1 c
  pid_of "node-$n" >/dev/null || die "node $n is not running"
  if isolated; then c=$(node_init "$n"); kill -s KILL "$c"   # the kernel kills all of the PID namespace
  else c=$(node_slurmd "$n" || true); end "node-$n" KILL; [ -z "$c" ] || kill -s KILL "$c"; reap_strays "$n"; fi
  end "node-$n" KILL
}
# Without namespaces the tasks of a node are ordinary host processes. Slurm gave each of them our
# slurm.conf and the node's name in its environment; its parent may be the step's slurmstepd.
reap_strays() {
  local e p q
  for e in /proc/[0-9]*/environ; do
    { tr '\0' '\n' <"$e"; } 2>/dev/null | grep -cxE "SLURM_CONF=$CONF|SLURMD_NODENAME=$1" | grep -qx 2 || continue
    p=${e#/proc/}; p=${p%/environ}
    q=$({ sed 's/.*) . \([0-9]*\).*/\1/' <"/proc/$p/stat"; } 2>/dev/null) || continue
    [ "$(cat "/proc/$q/comm" 2>/dev/null)" = slurmstepd ] || q=
    kill -s KILL $q "$p" 2>/dev/null || true
  done
}

# ---- commands ---------------------------------------------------------------------------------
all_idle() { [ "$(sinfo -h -N -o '%N %t' 2>/dev/null | sort -u | grep -cE ' (idle|alloc|mix)$')" = "$(nodes | wc -l)" ]; }
running() { [ -f "$CONF" ] && pid_of slurmctld >/dev/null && timeout 10 scontrol ping >/dev/null 2>&1; }

start_controller() {
  if ! pid_of slurmctld >/dev/null; then
    setsid slurmctld -D -f "$CONF" </dev/null >>"$CLUSTER_DIR/log/slurmctld.out" 2>&1 9>&- &
    record slurmctld $!
  fi
  wait_for slurmctld 20 running
}
cmd_start() {
  install_packages
  if running; then
    local n
    for n in $(nodes); do start_node "$n"; done
    for n in $(sinfo -h -N -t drain,fail -o %N | sort -u); do scontrol update "NodeName=$n" State=RESUME; done
    wait_for "nodes to be up" 30 all_idle
    say "already running in $CLUSTER_DIR"; return 0
  fi
  if [ -d "$CLUSTER_DIR/pids" ]; then cmd_stop; fi
  rm -rf "$CLUSTER_DIR"/{state,spool,run}
  configure
  munged --key-file="$CLUSTER_DIR/munge.key" --socket="$CLUSTER_DIR/run/munge.sock" --num-threads=4 \
    --pid-file="$CLUSTER_DIR/run/munged.pid" --log-file="$CLUSTER_DIR/log/munged.log" \
    --seed-file="$CLUSTER_DIR/run/munged.seed" 9>&-
  wait_for munged 10 test -s "$CLUSTER_DIR/run/munged.pid"
  record munged "$(cat "$CLUSTER_DIR/run/munged.pid")"
  start_controller
  for n in $(nodes); do start_node "$n"; done
  wait_for "nodes to be up" 30 all_idle
  say "$(nodes | wc -l) nodes up in $CLUSTER_DIR (isolated: $(cat "$CLUSTER_DIR/isolated")); use: eval \"\$($0 env)\""
}
cmd_stop() {
  [ -d "$CLUSTER_DIR/pids" ] || { say "nothing to stop in $CLUSTER_DIR"; return 0; }
  local f n c
  if running; then timeout 10 scancel --state=PENDING --quiet --user="$(id -un)" 2>/dev/null || true
    timeout 10 scancel --signal=KILL --full --quiet --user="$(id -un)" 2>/dev/null || true; fi
  for f in "$CLUSTER_DIR"/pids/node-*; do
    [ -e "$f" ] || continue; n=${f##*/node-}
    if isolated; then end "node-$n" TERM "$(node_init "$n" || true)"; else   # unshare itself ignores TERM
      c=$(node_slurmd "$n" || true); end "node-$n"; [ -z "$c" ] || kill -s TERM "$c" 2>/dev/null || true; reap_strays "$n"; fi
  done
  end slurmctld; end munged
  say "stopped $CLUSTER_DIR (logs kept in $CLUSTER_DIR/log)"
}
cmd_status() {
  local f
  for f in "$CLUSTER_DIR"/pids/*; do [ -e "$f" ] || continue
    printf '%-12s %s\n' "${f##*/}" "$(pid_of "${f##*/}" || echo dead)"; done
  running && sinfo -N -o '%N %t %c %m %G %E' && squeue
}

cmd=${1:-}; shift || true
case $cmd in start | stop | start-node | kill-node | stop-controller | start-controller)
  mkdir -p "$CLUSTER_DIR"; exec 9>"$CLUSTER_DIR/lock"; flock -w 120 9 || die "another start/stop is running" ;;
esac
case $cmd in
  start) cmd_start ;;
  stop) cmd_stop ;;
  status) cmd_status ;;
  env) echo "export SLURM_CONF='$CONF'" ;;
  logs) tail -n 40 "$CLUSTER_DIR"/log/* ;;
  install) install_packages ;;
  start-node) start_node "$1" ;;
  kill-node) kill_node "$1" ;;
  stop-controller) end slurmctld ;;
  start-controller) start_controller ;;
  kill-slurmd) kill -s KILL "$(node_slurmd "$1" || die "no slurmd on $1")" ;;
  freeze-node | thaw-node)
    sig=STOP; [ "$cmd" = freeze-node ] || sig=CONT
    isolated || die "$cmd needs namespaces"
    # every process whose PID namespace is the node's
    ns=$(readlink "/proc/$(node_init "$1")/ns/pid")
    for p in /proc/[0-9]*; do [ "$(readlink "$p/ns/pid" 2>/dev/null)" != "$ns" ] || kill -s $sig "${p#/proc/}" 2>/dev/null || true; done ;;
  *) sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
