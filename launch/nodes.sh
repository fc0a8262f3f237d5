#!/usr/bin/env bash
# launch/nodes.sh NODES NODE MASTER[:PORT] SCRIPT [options]: run a torchrun job on this machine as node NODE of NODES.
# The same line on every node, but for NODE: 0 on the machine MASTER. Traffic goes by the interface that reaches MASTER.
#   PROCESSES=auto   processes per node: a number; auto: one per GPU, or per core
#   IFNAME=          the interface, where the choice is wrong
#   RESTARTS=0       how often all ranks start anew from the checkpoint after one has failed
#   MIN_NODES=NODES  go on with so few nodes when one is lost (with RESTARTS), after half a minute. Not without node 0,
#                    where they meet. The checkpoint must be where all nodes see it: any may hold rank 0 afterwards.
#   DRY_RUN=1        print the command and end
set -euo pipefail

fail() { echo "nodes.sh: $*" >&2; exit 1; }
number() { [[ "$2" =~ ^[0-9]+$ ]] || fail "$1 must be a number, got '$2'"; }

[ $# -ge 4 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
nodes="$1" node="$2" master="${3%:*}" port=29500
[[ "$3" != *:* ]] || port="${3##*:}"
shift 3
number NODES "$nodes" && number NODE "$node" && number PORT "$port"
number RESTARTS "${RESTARTS:-0}" && number MIN_NODES "${MIN_NODES:-1}"
[ "$node" -lt "$nodes" ] || fail "NODE must be below NODES=$nodes, got $node"
[ -f "$1" ] || fail "there is no script $1 on $(hostname)"

bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
[ -z "${VIRTUAL_ENV:-}" ] || bin="$VIRTUAL_ENV/bin"
[ ! -x "$bin/torchrun" ] || PATH="$bin:$PATH"
command -v torchrun >/dev/null || fail "there is no torchrun: run launch/setup.sh, or activate your environment"

# The way to MASTER; MASTER itself reaches its own address by lo, so there the interface that has the address counts.
address="$(getent ahostsv4 "$master" | awk 'NR == 1 {print $1}')" || true
[ -n "$address" ] || fail "cannot find the address of '$master'"
interface="${IFNAME:-}"
if [ -z "$interface" ]; then
    interface="$(ip -o -4 address show | awk -v to="$address" '{split($4, a, "/")} a[1] == to {print $2; exit}')"
    [ -n "$interface" ] || interface="$(ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')"
fi
[ -d "/sys/class/net/$interface" ] || fail "there is no interface '$interface'; there are: $(ls -x /sys/class/net)"
if [ "$interface" = lo ] && [ "$nodes" -gt 1 ]; then
    fail "$master is reached by lo, where other nodes are not: give the name or address that they know it by"
fi
export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface" TP_SOCKET_IFNAME="$interface"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A store for each start of the ranks: in the one that all starts share, ranks find what those before them have left.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

command=(
    torchrun --nnodes "${MIN_NODES:-$nodes}:$nodes" --nproc-per-node "${PROCESSES:-auto}"
    --max-restarts "${RESTARTS:-0}" --rdzv-id "${JOB:-terncomm}" --rdzv-backend c10d
    --rdzv-endpoint "$address:$port" --rdzv-conf "is_host=$([ "$node" -eq 0 ] && echo true || echo false)"
    --local-addr "$(ip -o -4 address show dev "$interface" | awk '{split($4, a, "/"); print a[1]; exit}')"
    "$@"
)
echo "nodes.sh: node $node of $nodes by $interface: ${command[*]}" >&2
[ -n "${DRY_RUN:-}" ] || exec "${command[@]}"
