# syntax=docker/dockerfile:1
# `make check` lints this file and tests/test_dockerfile.py holds its promises, but nothing builds it where no Docker
# engine is.
#
#   docker build -t layercast .                                                                     CPU
#   docker build -t layercast --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .      NVIDIA GPU
#   docker run --read-only --cap-drop ALL -p 8000:8000 -p 8001:8001 -p 8002:8002 layercast
#
# It serves the models of the zoo, which the build exported to /models, and writes nothing. Your own:
#   docker run --read-only -v /path/to/repository:/models:ro -p 8001:8001 layercast
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/layercast
ENV PATH=/opt/layercast/bin:$PATH
# torch in a layer of its own, which a change of our code leaves alone. What it depends on comes with our package.
COPY constraints/cpu.txt /source/constraints/
RUN pip install --no-deps --index-url "$TORCH_INDEX" -r /source/constraints/cpu.txt
WORKDIR /source
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY proto proto
COPY models models
COPY client client
COPY server server
RUN pip install -c constraints/cpu.txt ".[server,gpu]"

# The exporters are needed once, here, and not in the image.
FROM build AS export
RUN pip install -c constraints/cpu.txt ".[server,gpu,export]" && layercast export --all --output /models

# So are the compilers. What they make is named after these sources and this interpreter.
FROM build AS compile
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends -y g++ gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install -c constraints/cpu.txt ".[server,gpu,compile]" && layercast compile
# Where kernels of engines can be made, they must have been.
RUN ["python", "-c", "from layercast.server import compiled as c, kernels as k; raise SystemExit(not (k.missing() or k.are_whole(c.find(c.default_folder()) / k.FOLDER)))"]

FROM python:${PYTHON_VERSION}-slim
# By number: Kubernetes cannot tell that a named user is not root.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin layercast
COPY --from=build /opt/layercast /opt/layercast
COPY --from=compile /opt/layercast/share/layercast/compiled /opt/layercast/share/layercast/compiled
COPY --from=export /models /models
ENV PATH=/opt/layercast/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1
# No image without it: the server would run the sources, which answer fewer requests, and only its start would say so.
RUN ["python", "-c", "from layercast.server.compiled import default_folder, use; raise SystemExit(not use(default_folder()))"]
USER 10001:10001
WORKDIR /models
# HTTP, gRPC, metrics
EXPOSE 8000 8001 8002
# The server drains on SIGTERM: it must be process 1, hence the exec form. Give `docker stop` its drain time with -t.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import grpc; from grpc_health.v1 import health_pb2 as m, health_pb2_grpc as s; reply = s.HealthStub(grpc.insecure_channel('127.0.0.1:8001', [('grpc.enable_http_proxy', 0)])).Check(m.HealthCheckRequest(), timeout=4); raise SystemExit(reply.status != m.HealthCheckResponse.SERVING)"]
# Inside a container 127.0.0.1 would be reached by nobody. Which of the ports the outside sees is for `-p` to say.
ENTRYPOINT ["layercast", "serve", "--host", "0.0.0.0", "--repository", "/models"]
