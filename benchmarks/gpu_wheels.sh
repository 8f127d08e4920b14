#!/usr/bin/env bash
# Collects into FOLDER the wheels that a GPU machine with torch, transformers, lightning and peft but no network lacks, 5 MB in all:
#   benchmarks/gpu_wheels.sh FOLDER [PYTHON_VERSION]
# There: python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl, then PYTHONPATH=SITE:. python3 -m benchmarks.gpu
set -euo pipefail
folder=$1 version=${2:-3.12}
mkdir -p "$folder"
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
fetch() { python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" "${platforms[@]}" --dest "$@"; }
fetch "$folder" torchdata==0.11.0 'hydra-core==1.3.*' 'omegaconf>=2.3,<2.4' datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 gguf
# Hydra's parser fits no newer one, and this one is a source archive only.
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" antlr4-python3-runtime==4.9.3
# The library for CUDA 13 is all that is taken of bitsandbytes: 4 MB instead of 43.
whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
fetch "$whole" bitsandbytes==0.50.2
(
  cd "$whole"
  mkdir parts && cd parts && unzip -q ../bitsandbytes*.whl
  find bitsandbytes -name 'libbitsandbytes_*.so' ! -name '*cuda130.so' ! -name '*cpu.so' -delete
  zip -qr9 ../slim.whl .
)
mv "$whole/slim.whl" "$folder/bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl"
du -sh "$folder"
