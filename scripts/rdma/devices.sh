#!/usr/bin/env bash
# Soft-RoCE devices on the ends of veth pairs: rxe0 (10.0.0.1) with rxe1 (10.0.0.2), and rxe2 (10.0.1.1) with rxe3
# (10.0.1.2) as a second rail. Only for a machine of its own: it changes the routing rules.
#
# rxe listens in the initial network namespace only, so both ends of a pair are in it. Frames shall cross the wire all
# the same: addresses count as local only for what arrives, and each device has a route to its other end.
set -euo pipefail
PATH=/usr/sbin:/usr/bin:/sbin:/bin

ip link set lo up
echo 1 >/proc/sys/net/ipv4/conf/all/accept_local
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
ip rule add pref 20 lookup local

# end DEVICE ADDRESS PEER_DEVICE PEER_ADDRESS TABLE: one end of a pair.
end() {
    ip addr add "$2/32" dev "$1"
    ip link set "$1" up
    echo 1 >"/proc/sys/net/ipv4/conf/$1/accept_local"
    echo 0 >"/proc/sys/net/ipv4/conf/$1/rp_filter"
    ip rule add pref 5 iif "$1" lookup local
    ip rule add pref 10 oif "$1" lookup "$5"
}
# road DEVICE ADDRESS PEER_DEVICE PEER_ADDRESS TABLE: the way from one end to the other; again after a link was down.
road() {
    ip route replace table "$5" "$4/32" dev "$1" src "$2"
    ip neigh replace "$4" lladdr "$(cat "/sys/class/net/$3/address")" dev "$1"
}

ends=(
    "v0 10.0.0.1 v1 10.0.0.2 100"
    "v1 10.0.0.2 v0 10.0.0.1 101"
    "v2 10.0.1.1 v3 10.0.1.2 102"
    "v3 10.0.1.2 v2 10.0.1.1 103"
)
for pair in "v0 v1" "v2 v3"; do
    read -r one other <<<"$pair"
    ip link add "$one" mtu 4200 type veth peer name "$other" mtu 4200 # room for RoCE's largest MTU, 4096
done
for each in "${ends[@]}"; do end $each; done
for each in "${ends[@]}"; do road $each; done
ip rule del pref 0
for i in 0 1 2 3; do rdma link add "rxe$i" type rxe netdev "v$i"; done
