# The app, the scripts and their packages.
#
#   docker build -t des .                                       PyTorch with CUDA libraries
#   docker build -t des --build-arg TORCH_INDEX=URL .           URL: the package index of PyTorch's CPU builds, from pytorch.org
#   docker run -p 7860:7860 des                                 the demo's app on http://127.0.0.1:7860
#   docker run --gpus all -v "$PWD/data:/data" des python train_des.py --help
FROM python:3.11-slim
ARG TORCH_INDEX=
WORKDIR /des
COPY requirements.txt requirements-app.txt constraints.txt ./
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --index-url "$TORCH_INDEX" $(grep -E '^torch(vision)?==' constraints.txt); \
    fi && \
    pip install --no-cache-dir -r requirements.txt -r requirements-app.txt -c constraints.txt
COPY . .
EXPOSE 7860
CMD ["python", "app.py", "--host", "0.0.0.0"]
