# Training on NVIDIA GPUs. From the root of the repository:
#
#   docker build -f recipes/docker/train.Dockerfile -t m2f-train .
#   mkdir -p runs
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -e HF_TOKEN \
#       -v "$PWD/my_coco:/data:ro" -v "$PWD/runs:/work/runs" m2f-train \
#       train dinov3_vits16plus_1024 --dataset_name /data --output_dir runs/first
#
# HF_TOKEN: DINOv3's weights are gated. Without it: --backbone timm/vit_small_plus_patch16_dinov3.lvd1689m
#
# The wheel of torch brings its own CUDA libraries; the base image brings what the NVIDIA container runtime looks for.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# Triton compiles the launchers of its kernels with gcc and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH HF_HOME=/work/.cache HOME=/work
RUN python3 -m venv /opt/venv && mkdir -m 1777 /work

WORKDIR /source
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[fast,heic,tensorboard,tiff,video]"

WORKDIR /work
USER 1000
ENTRYPOINT ["m2f"]
CMD ["--help"]
