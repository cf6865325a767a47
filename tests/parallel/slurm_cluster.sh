#!/usr/bin/env bash
# slurm_cluster.sh start|stop DIR: a Slurm cluster of two nodes, n1 and n2, on this machine, for tests.  As root, with Debian's slurm-wlm
# and munge.  Key, sockets, state and logs live in DIR and the ports are free ones, so that nothing of the system's is
# touched and several clusters run side by side.  Jobs of the partition main push those of low out, which have ten seconds
# to save.  CPUs and GPUs are only counted, and no resolver knows the nodes.  After the start: export SLURM_CONF=DIR/slurm.conf
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

free_ports() {
    python3 -c 'import socket; s = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]; print(*(x.getsockname()[1] for x in s))'
}

write_config() {
    local dir=$1 host controller_port first_port second_port
    host=$(hostname -s)
    read -r controller_port first_port second_port < <(free_ports)
    printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$dir/gres.conf"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.sock
SlurmctldPort=$controller_port
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MpiDefault=none
KillWait=5
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$first_port CPUs=16 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$second_port CPUs=16 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=low Nodes=n[1-2] MaxTime=INFINITE PriorityTier=1 GraceTime=10 State=UP
CONF
}

start() {
    local dir=$1
    mkdir -p "$dir"/{state,log,spool/n1,spool/n2}
    chmod 755 "$dir"
    head -c 1024 /dev/urandom >"$dir/munge.key"
    chmod 600 "$dir/munge.key"
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" 2>>"$dir/log/munged.err"
    write_config "$dir"
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -c -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N n1
    slurmd -f "$SLURM_CONF" -N n2
    for _ in $(seq 200); do
        [ "$(sinfo --noheader --partition=main --format=%T%D 2>/dev/null)" = idle2 ] && return 0
        sleep 0.1
    done
    tail -n 20 "$dir"/log/slurm* >&2
    return 1
}

stop() {
    local pid_file
    export SLURM_CONF=$1/slurm.conf
    scancel --user="$(id -un)" || true
    for _ in $(seq 100); do
        [ -z "$(squeue --noheader 2>/dev/null)" ] && break
        sleep 0.1
    done
    for pid_file in "$1"/slurmd-n1.pid "$1"/slurmd-n2.pid "$1"/slurmctld.pid "$1"/munged.pid; do
        [ -s "$pid_file" ] && kill "$(cat "$pid_file")" || true
    done
}

case ${1:-} in
    start | stop) "$1" "$(realpath -m "${2:?a folder}")" ;;
    *) echo "usage: $0 start|stop DIR" >&2 && exit 2 ;;
esac
