# nnU-Net with nnunet-conres. PyTorch's wheels bring CUDA along; the host needs NVIDIA's driver and container toolkit.
#
#   docker build -t nnunet-conres .                                                                     # CUDA
#   docker build -t nnunet-conres:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .    # CPU
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v /data/nnunet:/data nnunet-conres \
#       nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerConResNet
#
# Without a GPU leave --gpus out and add -device cpu. /data holds nnUNet_raw, nnUNet_preprocessed and nnUNet_results.
FROM python:3.12-slim

ARG TORCH_INDEX=https://pypi.org/simple

# torch.compile needs a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --no-cache-dir torch --index-url "$TORCH_INDEX"

WORKDIR /opt/nnunet-conres
COPY pyproject.toml README.md LICENSE ./
COPY nnunet_conres ./nnunet_conres
RUN pip install --no-cache-dir . && nnunet-conres info

# Any user may run it: what libraries cache goes to /tmp.
ENV nnUNet_raw=/data/nnUNet_raw \
    nnUNet_preprocessed=/data/nnUNet_preprocessed \
    nnUNet_results=/data/nnUNet_results \
    HOME=/tmp \
    MPLBACKEND=Agg \
    PYTHONUNBUFFERED=1
WORKDIR /data
CMD ["nnunet-conres", "info"]
