# vidfill for a machine with NVIDIA GPUs, whose driver and container toolkit the host brings.
#
#   make dist && docker build --tag vidfill .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" vidfill \
#       vidfill train shards run --config base
FROM python:3.11-slim

# torch.compile, Triton and DeepSpeed compile small programs when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY constraints.txt dist/vidfill-*.whl /opt/vidfill/

# Every version as tested, except torch: the registry's own build brings CUDA's libraries.
RUN sed --in-place '/^torch==/d' /opt/vidfill/constraints.txt \
    && pip install --no-cache-dir --constraint /opt/vidfill/constraints.txt /opt/vidfill/vidfill-*.whl

WORKDIR /work
CMD ["vidfill", "--help"]
