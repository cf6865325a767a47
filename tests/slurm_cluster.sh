#!/usr/bin/env bash
# slurm_cluster.sh start|stop DIR: a Slurm cluster of one node on this machine, for tests.  As root, with Debian's slurm-wlm
# and munge.  Key, sockets, state and logs live in DIR and the ports are free ones, so that nothing of the system's is
# touched and several clusters run side by side.  After the start: export SLURM_CONF=DIR/slurm.conf
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

free_ports() {
    python3 -c 'import socket; s = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]; print(*(x.getsockname()[1] for x in s))'
}

write_config() {
    local dir=$1 host controller_port node_port
    host=$(hostname -s)
    read -r controller_port node_port < <(free_ports)
    echo "Name=gpu File=/dev/null" >"$dir/gres.conf"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.sock
SlurmctldPort=$controller_port
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=5
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$node_port CPUs=16 RealMemory=16000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=n1 Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    local dir=$1
    mkdir -p "$dir"/{state,spool,log}
    chmod 755 "$dir"
    head -c 1024 /dev/urandom >"$dir/munge.key"
    chmod 600 "$dir/munge.key"
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" 2>>"$dir/log/munged.err"
    write_config "$dir"
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -c -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N n1
    for _ in $(seq 200); do
        [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && return 0
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
    for pid_file in "$1"/slurmd.pid "$1"/slurmctld.pid "$1"/munged.pid; do
        [ -s "$pid_file" ] && kill "$(cat "$pid_file")" || true
    done
}

case ${1:-} in
    start | stop) "$1" "$(realpath -m "${2:?a folder}")" ;;
    *) echo "usage: $0 start|stop DIR" >&2 && exit 2 ;;
esac
