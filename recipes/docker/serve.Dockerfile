# A trained model as an HTTP server, on CPUs. From the root of the repository:
#
#   docker build -f recipes/docker/serve.Dockerfile -t m2f-serve .
#   docker run --rm --read-only --tmpfs /tmp --user "$(id -u):$(id -g)" \
#       -p 127.0.0.1:8000:8000 -v "$PWD/runs/first:/model:ro" m2f-serve
#   curl --data-binary @photo.jpg http://127.0.0.1:8000/instances
FROM python:3.12-slim-bookworm

WORKDIR /source
COPY . .
# torch without CUDA, in the version of constraints.txt
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir --constraint constraints.txt ".[heic,serve,tiff]"

ENV HOME=/tmp HF_HUB_OFFLINE=1
WORKDIR /tmp
USER 1000
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["m2f", "serve", "--host", "0.0.0.0"]
CMD ["/model"]
