#!/usr/bin/env bash
# A Slurm of one node, this machine, for trying sweeps. Needs root and Debian's slurm-wlm and munge.
#
#   eval "$(tests/slurm_one_node.sh start DIR)"    start it; its files and logs are in DIR
#   tests/slurm_one_node.sh stop DIR               stop it
#
# Partition `low` (the default) is preempted by `high`: its job gets SIGTERM, has 60 seconds to save a
# checkpoint, and is queued again.
set -euo pipefail
action=${1:?start or stop}
mkdir -p "${2:?a folder}"
dir=$(cd "$2" && pwd)

if [ "$action" = stop ]; then
  # Jobs outlive the daemons, so they end before.
  export SLURM_CONF="$dir/slurm.conf"
  for _ in $(seq 60); do
    jobs=$(squeue -h -o %A 2>/dev/null) && [ -n "$jobs" ] || break
    scancel --signal=KILL --full $jobs 2>/dev/null || true
    scancel $jobs 2>/dev/null || true
    sleep 0.5
  done
  for name in slurmd slurmctld munged; do
    [ -f "$dir/$name.pid" ] && kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
  done
  exit 0
fi

mkdir -p "$dir/state" "$dir/spool"
chmod 755 "$dir"
head -c 1024 /dev/urandom >"$dir/munge.key"
chmod 400 "$dir/munge.key"
host=$(hostname -s)
port=$((20000 + $$ % 10000 * 2))  # two tests may run at the same time
cpus=$(env -u OMP_NUM_THREADS nproc)
# Slurm starts a job that is queued again once its first credential has expired, by default after two
# minutes.
cat >"$dir/slurm.conf" <<EOF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=$host MaxTime=INFINITE State=UP PriorityTier=2
EOF
export SLURM_CONF="$dir/slurm.conf"
munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
  --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" >&2
slurmctld >&2
slurmd >&2
for _ in $(seq 60); do
  sinfo -h -o %t 2>/dev/null | grep -q idle && break
  sleep 0.5
done
sinfo -h -o %t | grep -q idle || { echo "the node did not come up; see $dir/*.log" >&2; exit 1; }
echo "export SLURM_CONF=$dir/slurm.conf"
