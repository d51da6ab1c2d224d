# Everything in one container, as an ordinary user. Built with the network, run without it (docs/sandbox.md):
#   docker build -t s2d2-lmeval .            on a machine with an NVIDIA GPU: --build-arg TORCH_INDEX=
FROM python:3.12-slim AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=wheel /wheel /wheel
COPY constraints.txt /wheel/
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c /wheel/constraints.txt \
        "$(echo /wheel/*.whl)[serve,sweep]" \
    && useradd --create-home evaluator \
    && mkdir /out /home/evaluator/.cache && chown evaluator /out /home/evaluator/.cache
USER evaluator
WORKDIR /out
ENTRYPOINT ["s2d2-lmeval"]
CMD ["doctor"]
