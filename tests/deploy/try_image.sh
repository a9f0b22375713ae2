#!/usr/bin/env bash
# Builds a target of deploy/Dockerfile, trains three steps in it and stops a longer run by SIGTERM; without Docker and
# without a registry of images, as root on Debian 12 with: buildah podman runc debootstrap. Takes some minutes.
#
#     tests/deploy/try_image.sh TARGET WORK_FOLDER [OPTIONS OF buildah build, as --secret id=pip,src=pip.conf]
set -euo pipefail
target=$1 work=$2
shift 2
cd "$(dirname "$0")/../.."
stores=(--root "$work/storage" --runroot "$work/runroot")
export BUILDAH_ISOLATION=chroot

mkdir -p "$work"
[ -d "$work/debian" ] || debootstrap --variant=minbase bookworm "$work/debian" > "$work/debootstrap.log"
if ! buildah "${stores[@]}" inspect --type image localhost/debian:12.11-slim > /dev/null 2>&1; then
    base=$(buildah "${stores[@]}" from scratch)
    buildah "${stores[@]}" add --quiet "$base" "$work/debian" /
    buildah "${stores[@]}" commit --quiet "$base" localhost/debian:12.11-slim
fi
buildah "${stores[@]}" build --layers --pull-never --format docker --file deploy/Dockerfile \
    --ignorefile deploy/Dockerfile.dockerignore --target "$target" --tag "unipool:$target" "$@" .

# As `docker run --read-only` with no network and no capabilities; uid 1000 is the image's.
mkdir -p "$work/runs" "$work/data"
chown 1000:1000 "$work/runs" "$work/data"
unipool() {
    podman "${stores[@]}" --cgroup-manager cgroupfs --runtime runc --events-backend file run --rm --name try-unipool \
        --read-only --network none --cap-drop all --security-opt no-new-privileges --ulimit nofile=1024:1024 \
        --ulimit nproc=4096:4096 -v "$work/runs:/unipool/runs" -v "$work/data:/unipool/data" "localhost/unipool:$target" "$@"
}
tiny=(--set data.max_documents=300 --set eval.batches=1)
unipool train quickstart "${tiny[@]}" --set train.steps=3 --set run.dir=runs/three
unipool train quickstart "${tiny[@]}" --set train.steps=1000 --set run.dir=runs/stopped &
until [ -s "$work/runs/stopped/metrics.jsonl" ]; do sleep 1; done
podman "${stores[@]}" --cgroup-manager cgroupfs --runtime runc --events-backend file kill --signal TERM try-unipool
status=0
wait $! || status=$?
echo "status after SIGTERM: $status, to be 75"
[ "$status" -eq 75 ]
