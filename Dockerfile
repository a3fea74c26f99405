# Trains and evaluates:
#   docker build -t enact .
#   docker run --rm enact DETR-ENACT/main.py --help
# docker-compose.yml adds the GPUs, the data and the folder for the results.

# Plain Python, because torch's wheels carry their own CUDA libraries: the host only needs the NVIDIA
# driver and its container toolkit, and torch is the version that constraints.txt names. An image of
# PyTorch's would hold a second torch of another version. Not pinned further: a build has the fixes that
# Python and Debian made until then.
FROM python:3.11-slim-bookworm

# opencv-python links against libGL and GLib, which the slim image leaves out.
# Debian replaces a package's version within a release, so a pinned one would break the build one day.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace

# Dependencies first: with an empty package in the place of the real one, this layer (several GB) stays
# in the cache until one of these three files changes. The install is editable, so that the source
# copied further down is what gets imported.
COPY pyproject.toml constraints.txt LICENSE ./
RUN mkdir enact_common \
    && touch README.md enact_common/__init__.py \
    && pip install --no-cache-dir --root-user-action=ignore \
        -c constraints.txt -e ".[logging,plots,fast-eval]"

# Training runs as a user without rights. With the ids of whoever starts it (docker-compose.yml passes
# them), the results on the host belong to that person. -o: the id may be taken already.
ARG HOST_UID=1000
ARG HOST_GID=1000
RUN groupadd -o --gid "${HOST_GID}" enact \
    && useradd -o --uid "${HOST_UID}" --gid enact --create-home enact \
    && install -d --owner=enact --group=enact /outputs

COPY . .

# The source belongs to root, so Python could not store its bytecode next to it. Output is not buffered,
# so that `docker logs` shows an epoch when it ends.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

USER ${HOST_UID}:${HOST_GID}
ENTRYPOINT ["python"]
CMD ["DETR-ENACT/main.py", "--help"]
