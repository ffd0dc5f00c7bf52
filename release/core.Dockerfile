# lora-export without PyTorch: merges, graphs and `verify --base`. Build it in the root of the repository:
#   docker build -f release/core.Dockerfile -t lora-export-core .
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir "/src/core[cpu,report,gguf]" && rm -rf /src
RUN useradd --create-home --uid 1000 lora
USER 1000
WORKDIR /work
ENTRYPOINT ["lora-export"]
