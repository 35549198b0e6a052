# One static binary, root certificates, and nothing else. In a clone:
#
#   docker build -t docker-stats-to-backstop .
#
# The image it is built in: Go, Git (which has the version), a shell, and root certificates.
ARG GO_IMAGE=golang:1.26
FROM ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o /out/ . && mkdir -m 1777 /out/spool

FROM scratch
LABEL org.opencontainers.image.title="docker-stats-to-backstop" \
      org.opencontainers.image.description="Feeds Graphite with the stats of a host's Docker containers, through Backstop" \
      org.opencontainers.image.source="https://github.com/deliverous/docker-stats-to-backstop" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /src/LICENSE /
COPY --from=build /src/docs/third-party.md /THIRD_PARTY.md
# With /spool, where whatever user it runs as can make a folder of its own; in a new volume that is mounted there, too.
COPY --from=build /out/ /
ENV SRV_SPOOL=/spool/metrics
# Not root. It needs the group of the engine's socket as well, whose number is the host's: --group-add.
USER 65532:65532
ENTRYPOINT ["/docker-stats-to-backstop"]
