module github.com/deliverous/docker-stats-to-backstop/script/grafana

go 1.26.8

require github.com/grafana/grafana-foundation-sdk/go v0.0.22
