#!/usr/bin/env bash
# A real Slurm cluster of several nodes on one machine, for tests.
#
#   cluster.sh install             Debian packages, as root (exit 3 where that is not possible)
#   cluster.sh start | stop | status | env
#   cluster.sh crash-node NODE     the node dies with everything on it
#   cluster.sh start-node NODE
#   cluster.sh cut-node NODE       the node loses its network and runs on (mode net); join-node gives it back
#   cluster.sh on NODE COMMAND...  run a command among a node's processes
#
# Settings, from the environment:
#   DISTLM_SLURM_DIR    folder for everything it writes (default /tmp/distlm-slurm-USER)
#   DISTLM_SLURM_MODE   plain | ns | net (default: the last of them that works here)
#             plain  one slurmd per port; every node has this machine's name
#             ns     + own UTS, PID and mount namespace: own host name and /dev/shm, dies as a whole
#             net    + own network namespace: own eth0 and address
#   DISTLM_SLURM_NODES  number of nodes (default 4), named node1..nodeN
#   DISTLM_SLURM_CPUS _MEM _GPUS   what each node claims (4, 4000 MB, 2 pretended GPUs)
#   DISTLM_SLURM_MPI    what srun uses without --mpi: none (default) | pmix | pmi2
#   DISTLM_SLURM_ACCT   1: slurmdbd and MariaDB, so that sacct works (default 1 if installed)
#
# With openssh-server installed, each node (ns, net) also has a real sshd on port 22.
# Outside its folder it writes a marked block in /etc/hosts, SSH_CONF below and (net) a bridge; `stop` takes them back.
# Only processes that it started are ever signalled: each is recorded with its start time.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd /   # daemons outlive the folder this is called in
PATH=$PATH:/usr/sbin:/sbin
OWNER=$(id -un)
DIR=${DISTLM_SLURM_DIR:-/tmp/distlm-slurm-$OWNER}
NODES=${DISTLM_SLURM_NODES:-4}
CPUS=${DISTLM_SLURM_CPUS:-4} MEM=${DISTLM_SLURM_MEM:-4000} GPUS=${DISTLM_SLURM_GPUS:-2}
MPI=${DISTLM_SLURM_MPI:-none}
MARK=$DIR/.distlm-slurm
SSH_CONF=/etc/ssh/ssh_config.d/distlm-slurm.conf
BRIDGE=distlm-br
PATIENCE=600   # seconds for a daemon to answer; a busy machine may take minutes
export SLURM_CONF=$DIR/slurm.conf

log() { echo "cluster.sh: $*" >&2; }
have() { command -v "$1" >/dev/null; }

# --- choices: made once at the start, kept in the folder for later calls
best_mode() {
  if [ "$(id -u)" != 0 ] || ! unshare --uts --pid --fork --mount-proc true 2>/dev/null; then echo plain
  elif have ip && unshare --net ip link add distlm-try type bridge 2>/dev/null; then echo net
  else echo ns; fi
}
taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
free_port() {  # slurmctld's; slurmdbd has the one 2 above, the nodes those from 11 above
  local base port
  for base in $(seq 16817 100 19917); do
    for port in $base $((base + 2)) $(seq $((base + 10)) $((base + 10 + NODES))); do
      if taken "$port"; then continue 2; fi
    done
    echo "$base"; return
  done
  log "no free ports between 16817 and 20000"; return 1
}
free_net() {  # .254 is this machine, .N is nodeN
  local n
  for n in $(seq 77 99); do
    if ! have ip || ! ip -o -4 address | grep -v " $BRIDGE " | grep -q " 10\.213\.$n\."; then
      echo "10.213.$n"; return
    fi
  done
  log "no free network among 10.213.77.0/24 to 10.213.99.0/24"; return 1
}
choose() {
  MODE=${DISTLM_SLURM_MODE:-$(best_mode)}
  ACCT=${DISTLM_SLURM_ACCT:-$(have slurmdbd && have mariadbd && have my_print_defaults && echo 1 || echo 0)}
  PORT=$(free_port)
  NET=$(free_net)
}
if [ -e "$DIR/chosen" ]; then
  read -r MODE ACCT NODES PORT NET <"$DIR/chosen"
else
  MODE="" ACCT="" PORT="" NET=""
fi

# --- processes: each one started here has a file DIR/pids/NAME with "pid starttime"
start_time() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  stat=${stat##*) }   # the name before it may hold blanks
  # shellcheck disable=SC2086
  set -- $stat
  [ "$1" != Z ] && echo "${20}"
}
spawn() {  # NAME COMMAND...
  local name=$1 pid
  shift
  # setsid execs in place (a background child leads no process group), so $! is the daemon itself
  setsid "$@" </dev/null >>"$DIR/$name.out" 2>&1 &
  pid=$!
  echo "$pid $(start_time "$pid")" >"$DIR/pids/$name"
}
alive() {  # NAME [DIR]
  local pid started file=${2:-$DIR}/pids/$1
  [ -e "$file" ] || return 1
  read -r pid started <"$file"
  [ "$(start_time "$pid" || true)" = "$started" ]
}
pid_of() { cut -d' ' -f1 "$DIR/pids/$1"; }
end() {  # NAME [SIGNAL]
  local name=$1 signal=${2:-TERM}
  if alive "$name"; then
    kill -"$signal" "$(pid_of "$name")" 2>/dev/null || true
    for _ in $(seq 100); do alive "$name" || break; sleep 0.1; done
    if alive "$name"; then kill -KILL "$(pid_of "$name")" 2>/dev/null || true; fi
  fi
  rm -f "$DIR/pids/$name"
}
wait_for() {  # SECONDS WHAT COMMAND...
  local polls=$(( $1 * 20 )) what=$2
  shift 2
  for _ in $(seq "$polls"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.05; done
  log "gave up waiting for $what"
  return 1
}

# --- names and network
address() { case $MODE in net) echo "$NET.$1";; *) echo "127.0.1.$1";; esac; }
hosts() {  # add | remove: names of the nodes in /etc/hosts, between two marks
  [ -w /etc/hosts ] || return 0
  local text n
  text=$(mktemp)
  # shellcheck disable=SC1003  # $a\ ends the last line where it has no newline
  sed -e '/^# distlm-slurm begin/,/^# distlm-slurm end/d' -e '$a\' /etc/hosts >"$text"
  if [ "$1" = add ]; then
    { echo "# distlm-slurm begin $DIR"
      for n in $(seq "$NODES"); do echo "$(address "$n") node$n"; done
      echo "# distlm-slurm end"; } >>"$text"
  fi
  cat "$text" >/etc/hosts   # in place: /etc/hosts may be a bind mount
  rm -f "$text"
}
refuse_second() {  # node names, bridge and ssh settings are the machine's: one cluster at a time
  local other
  other=$(sed -n 's/^# distlm-slurm begin //p' /etc/hosts)
  if [ -n "$other" ] && [ "$other" != "$DIR" ] && alive slurmctld "$other"; then
    log "a cluster runs in $other: use it (export SLURM_CONF=$other/slurm.conf) or end it" \
        "(DISTLM_SLURM_DIR=$other $here/cluster.sh stop)"
    exit 1
  fi
}
network_up() {
  local n
  ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
  ip address replace "$NET.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for n in $(seq "$NODES"); do
    ip netns list | grep -qw "distlm-node$n" || ip netns add "distlm-node$n"
    if ! ip -n "distlm-node$n" link show eth0 >/dev/null 2>&1; then
      ip link add "distlm-v$n" type veth peer name eth0 netns "distlm-node$n"
      ip link set "distlm-v$n" master "$BRIDGE" up
    fi
    ip -n "distlm-node$n" address replace "$NET.$n/24" dev eth0
    ip -n "distlm-node$n" link set lo up
    ip -n "distlm-node$n" link set eth0 up
  done
}
network_down() {
  local n
  for n in $(seq "$NODES"); do ip netns del "distlm-node$n" 2>/dev/null || true; done
  ip link del "$BRIDGE" 2>/dev/null || true
}

# --- nodes
start_node() {  # N
  local n=$1 sshd="" init
  # as after a reboot: with the sockets of a crashed step in the spool, mpi/pmix refuses to start that step again
  rm -rf "$DIR/spool-node$n" "$DIR/tmp-node$n"
  mkdir -p "$DIR/spool-node$n" "$DIR/tmp-node$n"
  # --kill-child: when the recorded pid dies, so does every process of the node
  local separate=(unshare --uts --pid --fork --kill-child --mount-proc)
  if [ -e "$DIR/ssh/sshd_config" ]; then
    sshd="/usr/sbin/sshd -f '$DIR/ssh/sshd_config' -E '$DIR/sshd-node$n.log' -o ListenAddress=$(address "$n");"
  fi
  init="cd /; hostname node$n; mount -t tmpfs tmpfs /dev/shm; $sshd exec slurmd -D -N node$n"
  case $MODE in
    plain) spawn "slurmd-node$n" slurmd -D -N "node$n";;
    ns) spawn "slurmd-node$n" "${separate[@]}" sh -c "$init";;
    # not `ip netns exec`, which hides /sys
    net) spawn "slurmd-node$n" nsenter --net="/run/netns/distlm-node$n" "${separate[@]}" sh -c "$init";;
  esac
}
crash_node() {  # N
  end "slurmd-node$1" KILL
  if [ "$MODE" = plain ]; then log "mode plain: the node's job steps live on"; fi
}
on_node() {  # N COMMAND...
  local n=$1 outer
  shift
  [ "$MODE" != plain ] || exec "$@"
  outer=$(pid_of "slurmd-node$n")
  # the recorded pid is unshare's; its child is the first process of the node
  exec nsenter -t "$(cut -d' ' -f1 "/proc/$outer/task/$outer/children")" --uts --pid --mount --net "$@"
}

# --- configuration
write_conf() {
  local head head_address=127.0.0.1 bind="CommunicationParameters=NoCtldInAddrAny" nodes="" accounting gres="" n
  head=$(hostname -s)
  # (that option binds to what the host name resolves to, not to the address in SlurmctldHost)
  if [ "$MODE" = net ]; then head_address=$NET.254 bind=""; fi
  for n in $(seq "$NODES"); do
    case $MODE in
      plain) nodes+="NodeName=node$n NodeHostname=$head NodeAddr=127.0.0.1 Port=$((PORT + 10 + n))\n";;
      ns) nodes+="NodeName=node$n NodeAddr=$(address "$n") Port=$((PORT + 10 + n))\n";;
      net) nodes+="NodeName=node$n NodeAddr=$(address "$n") Port=$((PORT + 10))\n";;
    esac
  done
  if [ "$ACCT" = 1 ]; then
    accounting="AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
    accounting+="AccountingStoragePort=$((PORT + 2))\nAccountingStoragePass=socket=$DIR/munge.socket"
  else
    accounting="AccountingStorageType=accounting_storage/none"
  fi
  # named, it is never used; left to look for one itself, slurmd stops where there is no cgroup mount
  echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf"
  : >"$DIR/gres.conf"
  if [ "$GPUS" -gt 0 ]; then
    gres="Gres=gpu:v100:$GPUS"
    mkdir -p "$DIR/dev"
    for n in $(seq 0 $((GPUS - 1))); do
      # GPUs in name only. CUDA_VISIBLE_DEVICES is set only for a character device; this one is /dev/null again
      mknod "$DIR/dev/gpu$n" c 1 3 2>/dev/null || ln -s /dev/null "$DIR/dev/gpu$n"
    done
    echo "NodeName=node[1-$NODES] Name=gpu Type=v100 File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  fi
  sed -e "s|@DIR@|$DIR|g; s|@USER@|$OWNER|g; s|@HEAD@|$head|; s|@HEAD_ADDRESS@|$head_address|; s|@PORT@|$PORT|" \
      -e "s|@MPI@|$MPI|; s|@BIND@|$bind|; s|@CPUS@|$CPUS|; s|@MEM@|$MEM|; s|@GRES@|$gres|" \
      -e "s|@NODES@|$nodes|; s|@ACCOUNTING@|$accounting|" "$here/slurm.conf.in" >"$SLURM_CONF"
}
ssh_files() {  # a real sshd on each node, for pdsh, mpirun and launchers
  have sshd && [ -d /etc/ssh/ssh_config.d ] || return 0
  mkdir -p "$DIR/ssh" /run/sshd
  chmod 700 "$DIR/ssh"
  ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh/host_key"
  ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh/id"
  cp "$DIR/ssh/id.pub" "$DIR/ssh/authorized_keys"
  cat >"$DIR/ssh/sshd_config" <<CONF
Port 22
HostKey $DIR/ssh/host_key
AuthorizedKeysFile $DIR/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
CONF
  # ssh has no variable for its configuration and takes the home folder from the password file, not from HOME
  cat >"$SSH_CONF" <<CONF
Host node*
  IdentityFile $DIR/ssh/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
CONF
}
start_accounting() {
  local database=$DIR/db
  # on tmpfs where there is room: starts in 2 s, not 3 to 9
  if [ "$(df --output=avail -m /dev/shm 2>/dev/null | tail -1)" -gt 512 ] 2>/dev/null; then
    database=/dev/shm/distlm-slurm-$OWNER-$PORT
  fi
  rm -rf "$database"
  echo "$database" >"$DIR/database"
  mariadb-install-db --no-defaults --datadir="$database" --user="$OWNER" --skip-test-db \
    --auth-root-authentication-method=socket --auth-root-socket-user="$OWNER" >"$DIR/db-install.out" 2>&1
  spawn mariadbd mariadbd --no-defaults --datadir="$database" --user="$OWNER" --socket="$DIR/db.socket" \
    --skip-networking --pid-file="$DIR/mariadbd.pidfile" --innodb-lock-wait-timeout=900 \
    --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0 --skip-log-bin
  wait_for "$PATIENCE" mariadbd test -S "$DIR/db.socket"
  cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket
DbdHost=$(hostname -s)
DbdAddr=127.0.0.1
DbdPort=$((PORT + 2))
SlurmUser=$OWNER
LogFile=$DIR/slurmdbd.log
PidFile=$DIR/slurmdbd.pidfile
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$OWNER
StorageLoc=slurm_acct_db
CommitDelay=0
CONF
  chmod 600 "$DIR/slurmdbd.conf"
  # the client library takes its socket from this variable, so no TCP port is needed
  MYSQL_UNIX_PORT="$DIR/db.socket" spawn slurmdbd slurmdbd -D
  wait_for "$PATIENCE" slurmdbd timeout 60 sacctmgr -n show cluster
}

# --- verbs
start() {
  if alive slurmctld; then log "already running in $DIR"; return 0; fi
  refuse_second
  if [ -d "$DIR/pids" ]; then stop; fi
  if [ -e "$DIR" ] && [ ! -e "$MARK" ]; then log "$DIR is there and not ours"; exit 1; fi
  rm -rf "$DIR"
  mkdir -p "$DIR/pids" "$DIR/state"
  touch "$MARK"
  chmod 755 "$DIR"
  choose
  echo "$MODE $ACCT $NODES $PORT $NET" >"$DIR/chosen"
  trap 'log "start failed; logs are in $DIR"; stop' ERR
  write_conf
  (umask 077; head -c 128 /dev/urandom >"$DIR/munge.key")
  spawn munged munged -F --force --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" \
    --pid-file="$DIR/munged.pidfile" --log-file="$DIR/munged.log" --seed-file="$DIR/munged.seed"
  wait_for "$PATIENCE" munged test -S "$DIR/munge.socket"
  hosts add
  if [ "$MODE" = net ]; then network_up; fi
  if [ "$MODE" != plain ]; then ssh_files; fi
  if [ "$ACCT" = 1 ]; then start_accounting; fi
  spawn slurmctld slurmctld -D -c
  wait_for "$PATIENCE" slurmctld scontrol ping
  local n
  for n in $(seq "$NODES"); do start_node "$n"; done
  wait_for "$PATIENCE" "idle nodes" sh -c "[ \$(sinfo -h -N -p main -o %T | grep -cx idle) = $NODES ]"
  trap - ERR
  log "$NODES nodes up (mode $MODE, accounting $ACCT); export SLURM_CONF=$SLURM_CONF"
}
stop() {
  trap - ERR
  [ -d "$DIR/pids" ] || { log "not running"; return 0; }
  if alive slurmctld; then
    timeout 5 scancel -u "$OWNER" >/dev/null 2>&1 || true
    # shellcheck disable=SC2016
    wait_for 5 "jobs to end" sh -c '[ -z "$(squeue -h)" ]' || true
  fi
  local n
  for n in $(seq "$NODES"); do
    # ns, net: the whole node goes with its pid namespace
    if [ "$MODE" = plain ]; then end "slurmd-node$n"; else end "slurmd-node$n" KILL; fi
  done
  if [ "$MODE" = plain ]; then end_steps; fi
  for n in slurmctld slurmdbd mariadbd munged; do end "$n"; done
  if [ -s "$DIR/database" ]; then rm -rf "$(cat "$DIR/database")"; fi
  if [ "$MODE" = net ]; then network_down; fi
  hosts remove
  if grep -qsF "$DIR/ssh/id" "$SSH_CONF"; then rm -f "$SSH_CONF"; fi
  rm -rf "$DIR/pids" "$DIR/chosen"
  log "stopped"
}
end_steps() {  # mode plain: what this cluster's jobs left behind, known by their environment
  local process
  for process in /proc/[0-9]*; do
    if [ "${process#/proc/}" != $$ ] && belongs_to_job "$process"; then
      kill -KILL "${process#/proc/}" 2>/dev/null || true
    fi
  done
}
belongs_to_job() {  # /proc/PID
  local environment
  environment=$(tr '\0' '\n' 2>/dev/null <"$1/environ") || return 1
  grep -qx "SLURM_CONF=$SLURM_CONF" <<<"$environment" || return 1
  grep -q '^SLURM_JOB_ID=' <<<"$environment" || grep -qsx slurmstepd "$1/comm"
}
status() {
  local file name
  for file in "$DIR"/pids/*; do
    name=${file##*/}
    if alive "$name"; then echo "$name $(pid_of "$name")"; else echo "$name dead"; fi
  done
  sinfo -N
}
install() {
  local wanted=(slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core
                libpmix2 openssh-server pdsh iproute2)
  local missing=() package plugins
  if ! have apt-get || ! have dpkg; then log "cannot install: no apt-get here; install Slurm by hand"; exit 3; fi
  for package in "${wanted[@]}"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
  plugins=$(dpkg -L libpmix2 2>/dev/null | sed -n 's|/libpmix\.so\.2$||p' | grep '/pmix2/lib$' || true)
  if [ "${#missing[@]}" = 0 ] && [ -e "$plugins/libpmix.so" ]; then return 0; fi
  if [ "$(id -u)" != 0 ]; then log "cannot install ${missing[*]:-the link to libpmix}: not root"; exit 3; fi
  if [ "${#missing[@]}" -gt 0 ]; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
  fi
  # Debian's plugin mpi/pmix opens libpmix.so by this name, which only libpmix-dev has
  plugins=$(dpkg -L libpmix2 | sed -n 's|/libpmix\.so\.2$||p' | grep '/pmix2/lib$')
  [ -e "$plugins/libpmix.so" ] || ln -s libpmix.so.2 "$plugins/libpmix.so"
}

case ${1:-} in
  install | start | stop | status) "$1";;
  env) echo "export SLURM_CONF=$SLURM_CONF";;
  crash-node) crash_node "${2#node}";;
  cut-node) ip -n "distlm-$2" link set eth0 down;;
  join-node) ip -n "distlm-$2" link set eth0 up;;
  start-node) alive "slurmd-${2}" || start_node "${2#node}";;
  on) node=${2#node}; shift 2; on_node "$node" "$@";;
  *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$here/cluster.sh"; exit 2;;
esac
