# lora-export with PyTorch and onnxruntime for CUDA. Build it in the root of the repository, and give it the GPU:
#   docker build -f release/cuda.Dockerfile -t lora-export .
#   docker run --gpus all -v "$PWD:/work" lora-export doctor --provider cuda
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir "/src[hf,train,report,gguf]" "onnxruntime-gpu[cuda,cudnn]>=1.29" && rm -rf /src
RUN useradd --create-home --uid 1000 lora
USER 1000
WORKDIR /work
ENTRYPOINT ["lora-export"]
