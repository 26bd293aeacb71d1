#!/usr/bin/env bash
# A Docker engine of its own for tests/test_container.py, on a Debian machine that has none: run as root.
#
#     tests/container_engine.sh        prints DOCKER_HOST=unix:///... and BASE=..., then runs until its input ends
#
# By hand: start it, export the line it prints in another shell, and press Ctrl-D when done. A program holds the script's
# input open: when the program ends, however it ends, the input ends too, and the engine, its containers, its images and its
# folder go with it. What stays is the Debian packages that were missing.
set -euo pipefail

BASE=python:3.11-slim-bookworm
CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt

say() { echo "container_engine: $*" >&2; }

packages=()
for program in dockerd:docker.io docker:docker.io debootstrap:debootstrap; do
    command -v "${program%:*}" >/dev/null || packages+=("${program#*:}")
done
if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "needs ${packages[*]}, and installing them needs root on Debian"
        exit 1
    fi
    say "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >&2
fi

folder=$(mktemp -d /tmp/funmatch-engine.XXXXXX)
export DOCKER_HOST=unix://$folder/docker.sock
engine=
clean_up() {
    trap - EXIT
    trap '' HUP INT TERM
    if [ -n "$engine" ] && kill -0 "$engine" 2>/dev/null; then
        docker ps -aq | xargs -r docker rm -f >/dev/null 2>&1 || true
        kill "$engine"
        wait "$engine" || true
    fi
    # What a killed engine or debootstrap left mounted must go first, or rm would follow it.
    awk -v d="$folder/" 'index($2, d) == 1 {print $2}' /proc/mounts | sort -r | xargs -r -n 1 umount -l || true
    rm -rf --one-file-system "$folder"
}
trap clean_up EXIT
trap 'exit 130' HUP INT
trap 'exit 143' TERM

# No bridge and no firewall rules: builds use the host's network, tests use none, and the host's tables stay as they are.
setsid dockerd --data-root "$folder/data" --exec-root "$folder/exec" --pidfile "$folder/docker.pid" -H "$DOCKER_HOST" \
    --bridge=none --iptables=false --ip-masq=false >"$folder/dockerd.log" 2>&1 </dev/null &
engine=$!
for _ in $(seq 120); do
    docker info >/dev/null 2>&1 && break
    kill -0 "$engine" 2>/dev/null || { engine=; break; }
    sleep 0.5
done
docker info >/dev/null 2>&1 || { say "the engine did not start:"; tail -n 20 "$folder/dockerd.log" >&2; exit 1; }

if timeout 300 docker pull --quiet "$BASE" >/dev/null 2>"$folder/pull.log"; then
    base="$BASE, pulled"
else
    say "cannot pull $BASE ($(tail -n 1 "$folder/pull.log")); making a stand-in from Debian's own packages"
    root=$folder/root
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates bookworm "$root" \
        >"$folder/debootstrap.log" 2>&1 || { tail -n 20 "$folder/debootstrap.log" >&2; exit 1; }
    ln -s python3 "$root/usr/bin/python"
    rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    [ ! -r "$CA_BUNDLE" ] || cp "$CA_BUNDLE" "$root$CA_BUNDLE"
    tar --one-file-system -C "$root" -c . | docker import - "$BASE" >/dev/null
    rm -rf --one-file-system "$root"
    base="$BASE, a stand-in made by debootstrap"
fi

echo "DOCKER_HOST=$DOCKER_HOST"
echo "BASE=$base"
while read -r; do :; done
