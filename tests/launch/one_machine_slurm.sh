#!/bin/bash
# A Slurm of two nodes on this machine, for the tests marked `slurm`. As root on Debian:
#   bash tests/launch/one_machine_slurm.sh && pytest -m slurm tests/launch
#   bash tests/launch/one_machine_slurm.sh stop
# It installs Slurm and writes /etc/slurm: use a machine, or a container, that runs no other Slurm.
# Each node claims one GPU, so that jobs can ask for one; there need not be any. A lost node is noticed
# after SlurmdTimeout, and a job that comes back waits for cred_expire: both shorter than a cluster's.

set -euo pipefail

STATE=/var/tmp/one-machine-slurm

if [ "${1:-}" = stop ]; then
    for daemon in slurmd-n1 slurmd-n2 slurmctld munge/munged; do
        if [ -f "$STATE/$daemon.pid" ]; then kill "$(cat "$STATE/$daemon.pid")" || true; fi
    done
    exit
fi
if [ -e /etc/slurm/slurm.conf ] && ! grep -q "$STATE" /etc/slurm/slurm.conf; then
    echo "/etc/slurm/slurm.conf is another Slurm's: use another machine" >&2
    exit 1
fi
if sinfo --noheader > /dev/null 2>&1; then
    echo "it runs"
    exit
fi

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends slurmctld slurmd slurm-client munge

HOST=$(hostname -s)
install -d "$STATE" "$STATE/n1" "$STATE/n2"
install -d -o munge -g munge /run/munge "$STATE/munge"
cat > /etc/slurm/slurm.conf <<END
ClusterName=one-machine
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd-%n.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd-%n.log
StateSaveLocation=$STATE
SlurmdSpoolDir=$STATE/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
SlurmdTimeout=30
AuthInfo=cred_expire=5
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
GresTypes=gpu
NodeName=n1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=17001 CPUs=2 Gres=gpu:1
NodeName=n2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=17002 CPUs=2 Gres=gpu:1
PartitionName=all Nodes=n1,n2 Default=YES
END
echo 'Name=gpu File=/dev/null' > /etc/slurm/gres.conf

runuser -u munge -- munged --pid-file "$STATE/munge/munged.pid"
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 30); do
    if [ "$(sinfo --noheader --states idle --format %D)" = 2 ]; then break; fi
    sleep 1
done
sinfo
srun --nodes 2 true
