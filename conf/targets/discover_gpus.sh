#!/usr/bin/env bash
# Tells Spark which GPUs a machine has, as spark.worker.resource.gpu.discoveryScript (standalone) or
# spark.executor.resource.gpu.discoveryScript (YARN): the addresses that torch numbers its CUDA devices by.
set -euo pipefail

nvidia-smi --query-gpu=index --format=csv,noheader | awk '
  { addresses = addresses separator "\"" $1 "\""; separator = ", " }
  END { print "{\"name\": \"gpu\", \"addresses\": [" addresses "]}" }
'
