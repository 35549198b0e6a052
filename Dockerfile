# One static binary, root certificates, and nothing else. In a clone:
#
#   docker build -t docker-stats-to-backstop .
#
# The image it is built in: Go, Git (which has the version), a shell, and root certificates. "linux" is
# the builder's own processor, whatever the image is for: Go compiles for others.
FROM --platform=linux golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# Set by BuildKit; empty, they mean the builder's own.
ARG TARGETOS TARGETARCH TARGETVARIANT
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOARM=${TARGETVARIANT#v} \
    go build -trimpath -ldflags='-s -w' -o /out/ . && mkdir -m 1777 /out/spool

FROM scratch
# Set for a release, by .github/workflows/release.yml.
ARG VERSION REVISION CREATED
LABEL org.opencontainers.image.title="docker-stats-to-backstop" \
      org.opencontainers.image.description="Feeds Graphite with the stats of a host's Docker containers, through Backstop" \
      org.opencontainers.image.source="https://github.com/deliverous/docker-stats-to-backstop" \
      org.opencontainers.image.url="https://github.com/deliverous/docker-stats-to-backstop" \
      org.opencontainers.image.documentation="https://github.com/deliverous/docker-stats-to-backstop#readme" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /src/LICENSE /
COPY --from=build /src/docs/third-party.md /THIRD_PARTY.md
# With /spool, where any user can make a folder, also in a new volume.
COPY --from=build /out/ /
# "container" says to the program that it is in one, as https://systemd.io/CONTAINER_INTERFACE/ has it.
ENV SRV_SPOOL=/spool/metrics container=docker
# Not root. It also needs the group of the engine's socket, whose number is the host's: --group-add.
USER 65532:65532
ENTRYPOINT ["/docker-stats-to-backstop"]
