# An image for `kind: kubernetes`: Spark, Java 17, Python 3.11, Shoal with all that it needs, and no model (it is sent, or
# lies on a volume that `model: shared` speaks of).
#
#     docker build --tag shoal .
#     docker build --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu22.04 --tag shoal:cuda .
#
# torch brings CUDA's libraries along; of the second base it is the variables that matter, by which NVIDIA's runtime lets
# a container see the GPUs of its node.
ARG SPARK=apache/spark:4.2.0-scala2.13-java17-ubuntu
ARG BASE=debian:bookworm-slim

# hadolint ignore=DL3006
FROM ${SPARK} AS spark

# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      ca-certificates gosu openjdk-17-jre-headless procps python3.11 python3.11-venv tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --system --gid 185 spark \
 && useradd --system --uid 185 --gid spark --create-home spark \
 && ln -s /usr/lib/jvm/java-17-openjdk-* /opt/java

COPY --from=spark /opt/spark /opt/spark
COPY --from=spark /opt/entrypoint.sh /opt/entrypoint.sh

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY conf /src/conf
COPY udfs /src/udfs
COPY jobs /src/jobs
RUN python3.11 -m venv /opt/shoal \
 && /opt/shoal/bin/pip install --no-cache-dir --constraint /src/constraints.txt /src \
 && rm -rf /src

ENV JAVA_HOME=/opt/java \
    SPARK_HOME=/opt/spark \
    PATH=/opt/shoal/bin:/opt/spark/bin:$PATH \
    PYSPARK_PYTHON=/opt/shoal/bin/python3 \
    HF_HUB_OFFLINE=1 \
    MLFLOW_DISABLE_TELEMETRY=true

WORKDIR /opt/spark/work-dir
RUN chown spark:spark /opt/spark/work-dir
USER 185
ENTRYPOINT ["/opt/entrypoint.sh"]
