# Image for training and evaluation:
#   docker build -t enact .
#   docker run --rm enact DETR-ENACT/main.py --help
# docker-compose.yml adds the GPUs, the data and the results folder.

# Plain Python: torch's wheels contain the CUDA libraries, so the host only needs the NVIDIA driver and
# its container toolkit, and constraints.txt sets the version of torch. A PyTorch image would contain a
# second torch. The tag is not pinned further, so that a build gets the latest fixes of Python and Debian.
FROM python:3.11-slim-bookworm

# opencv-python links against libGL and GLib, which the slim image leaves out.
# Debian removes old package versions within a release, so pinned versions would break the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace

# Install the dependencies first, with empty packages in place of the real ones: this layer (several GB)
# stays cached until one of these three files changes. The install is editable, so Python imports the
# source that is copied below.
COPY pyproject.toml constraints.txt LICENSE ./
RUN python -c "import pathlib, tomllib; \
tools = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['tool']['setuptools']; \
moved = tools['package-dir']; \
places = [moved.get(name) or moved.get(name.rpartition('.')[0], '') + '/' + name.rpartition('.')[2] \
    if name in moved or name.rpartition('.')[0] in moved else name.replace('.', '/') for name in tools['packages']]; \
[pathlib.Path(place).mkdir(parents=True, exist_ok=True) for place in places]" \
    && touch README.md enact_common/__init__.py \
    && pip install --no-cache-dir --root-user-action=ignore \
        -c constraints.txt -e ".[logging,plots,fast-eval,explore]"

# Training runs as an unprivileged user. docker-compose.yml passes the ids of the host's user, who then
# owns the results. -o allows an id that already exists in the image.
ARG HOST_UID=1000
ARG HOST_GID=1000
RUN groupadd -o --gid "${HOST_GID}" enact \
    && useradd -o --uid "${HOST_UID}" --gid enact --create-home enact \
    && install -d --owner=enact --group=enact /outputs

COPY . .

# The source belongs to root, so Python cannot store bytecode next to it. Unbuffered output lets
# `docker logs` show an epoch as soon as it ends.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

USER ${HOST_UID}:${HOST_GID}
ENTRYPOINT ["python"]
CMD ["DETR-ENACT/main.py", "--help"]
