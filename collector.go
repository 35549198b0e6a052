package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	docker "github.com/fsouza/go-dockerclient"
	"golang.org/x/sync/errgroup"
)

// maxInFlight is how many containers are asked at the same time. Engines that answer at
// the tick of a one-second collector take one tick for all that are asked together; the
// bound keeps the number of open files within the usual limit of 1,024.
const maxInFlight = 512

// collector makes metrics of what the engine says about its containers. Its methods are
// called by one goroutine.
type collector struct {
	engine *engine
	rule   rule
	host   string // what --host says
	log    *slog.Logger

	engineName string                // the engine's own name, once it is known
	met        bool                  // whether the engine answers, as far as we know
	trouble    string                // the last trouble with the engine that was logged
	containers map[string]*container // the running ones of the last list, by id
}

// container is what is kept of a running container from one sweep to the next.
type container struct {
	id        string
	name      string    // without Docker's leading slash
	startedAt time.Time // zero until it is known
	checkedAt time.Time // when startedAt was last known to be right, by our clock
	restarted bool      // whether it may have been started since then
	trouble   string    // the last trouble with it that was logged, "" since it is well
}

// sweepResult is what one sweep brought.
type sweepResult struct {
	metrics []metric
	running int   // containers
	failed  int   // those of them that could not be read
	err     error // why the engine as a whole could not be asked, if it could not
}

// errStopped tells that a container stopped between the list and the question.
var errStopped = errors.New("it stopped while it was asked")

// hostName is the name of the host in its metrics, one node of a path: what --host says,
// else the engine's own name, else, until that is known, this machine's.
func (c *collector) hostName() string {
	name := c.host
	if name == "" {
		name = c.engineName
	}
	if name == "" {
		name, _ = os.Hostname()
	}
	return graphiteNode(name)
}

// sweep lists the running containers, asks all of them side by side, and returns their
// metrics and the host's. What goes wrong with one of them takes nothing from the others.
// Trouble is logged once, until it is over.
func (c *collector) sweep(ctx context.Context) sweepResult {
	start := time.Now()
	list, err := c.list(ctx)
	if err != nil {
		c.engineFailed(ctx, err)
		return sweepResult{err: err}
	}
	running := c.remember(list, start)

	type sample struct {
		metrics []metric
		err     error
	}
	samples := make([]sample, len(running))
	var group errgroup.Group
	group.SetLimit(maxInFlight)
	for i, known := range running {
		group.Go(func() error {
			samples[i].metrics, samples[i].err = c.sample(ctx, known, start)
			return nil // one that failed must not end the others
		})
	}
	group.Wait()

	result := sweepResult{running: len(running), err: context.Cause(ctx)}
	for _, s := range samples {
		result.metrics = append(result.metrics, s.metrics...)
		if result.err == nil && isConnectionError(s.err) {
			// Is it the container's trouble, or is the engine gone?
			if _, result.err = c.engine.hello(ctx); result.err != nil {
				c.engineFailed(ctx, result.err)
			}
		}
	}
	for i, s := range samples {
		if result.err != nil {
			break // which is no container's fault
		}
		c.containerIs(running[i], s.err)
		if s.err != nil && !isGone(s.err) {
			result.failed++
		}
	}
	if ctx.Err() == nil { // one that was cut short says nothing about the host
		host, now := c.hostName(), start.Unix()
		result.metrics = append(result.metrics,
			metric{host + ".containers.total", uint64(len(running)), now},
			metric{host + ".metrics.duration", uint64(time.Since(start)), now})
	}
	return result
}

// list returns the engine's running containers. An engine that was not met before, or not
// since it failed, is first asked what it is.
func (c *collector) list(ctx context.Context) ([]docker.APIContainers, error) {
	if c.met {
		return c.engine.list(ctx)
	}
	server, err := c.engine.hello(ctx)
	if err != nil {
		return nil, err
	}
	if c.host == "" {
		name, err := c.engine.name(ctx)
		var refused *docker.Error
		switch {
		case err == nil && name != "":
			c.engineName = name
		case err == nil || errors.As(err, &refused):
			// A proxy before the engine may forbid it, which is no reason to give up.
			c.log.Warn("the Docker engine does not tell its host's name, so this machine's is used; --host sets it",
				"host", c.hostName(), "reason", errorText(err))
		default:
			return nil, err
		}
	}
	list, err := c.engine.list(ctx)
	if err != nil {
		return nil, err
	}
	c.log.Info("Docker engine answers", "engine", server, "api", c.engine.api,
		"one_shot", c.engine.oneShot, "host", c.hostName(), "running", len(list))
	c.met, c.trouble = true, ""
	return list, nil
}

// engineFailed logs what is wrong with the engine, where that is news.
func (c *collector) engineFailed(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // we are ending, not the engine
	}
	c.met = false
	if text := errorText(err) + engineHint(err); text != c.trouble {
		c.trouble = text
		c.log.Error("Docker engine does not answer; it is asked again at every poll", "error", text)
	}
}

// containerIs logs what is wrong with a container, where that is news, or that it is well again.
func (c *collector) containerIs(known *container, err error) {
	trouble := errorText(err)
	if trouble == known.trouble {
		return
	}
	log := c.log.With("container", known.name)
	switch {
	case err == nil && known.trouble != errStopped.Error():
		log.Info("container can be read again")
	case isGone(err):
		log.Info("container is gone", "reason", trouble)
	case err != nil:
		log.Error("container cannot be read", "error", trouble)
	}
	known.trouble = trouble
}

// remember takes over a list made since start: it returns what is known of the containers
// in it, and forgets all others.
func (c *collector) remember(list []docker.APIContainers, start time.Time) []*container {
	running := make([]*container, 0, len(list))
	containers := make(map[string]*container, len(list))
	for _, listed := range list {
		name := containerName(listed.Names)
		if name == "" || containers[listed.ID] != nil {
			c.log.Debug("list entry without a name, or there twice", "id", listed.ID)
			continue
		}
		known := c.containers[listed.ID]
		if known == nil {
			known = &container{id: listed.ID}
		}
		known.name = name
		// If it was started since checkedAt, it is not up for longer than that.
		known.restarted = known.startedAt.IsZero() || upAtLeast(listed.Status) < start.Round(0).Sub(known.checkedAt.Round(0))+2*time.Second
		containers[listed.ID] = known
		running = append(running, known)
	}
	c.containers = containers
	return running
}

// containerName returns a container's name out of those in a list: old engines give the
// aliases that links gave it as well, as /other/alias. "" if there is none.
func containerName(names []string) string {
	for _, name := range names {
		name = strings.TrimPrefix(name, "/")
		if name != "" && !strings.Contains(name, "/") {
			return name
		}
	}
	return ""
}

// upAtLeast returns how long a container is up for at least, by the Status of a list, such as
// "Up 2 hours (healthy)". Statuses that do not say are 0.
// https://pkg.go.dev/github.com/docker/go-units#HumanDuration
func upAtLeast(status string) time.Duration {
	status, _, _ = strings.Cut(status, " (")
	switch status {
	case "Up About a minute":
		return time.Minute
	case "Up About an hour":
		return time.Hour
	}
	words := strings.Fields(status)
	if len(words) != 3 || words[0] != "Up" {
		return 0
	}
	n, err := strconv.ParseUint(words[1], 10, 16)
	if err != nil {
		return 0
	}
	const hour, day = time.Hour, 24 * time.Hour
	unit := map[string]time.Duration{
		"second": time.Second, "minute": time.Minute, "hour": hour, "day": day,
		"week": 7 * day, "month": 30 * day, "year": 365 * day,
	}[strings.TrimSuffix(words[2], "s")]
	up := time.Duration(n) * unit
	if unit >= hour {
		up -= hour // hours are rounded, and the longer ones are made of them
	}
	return up
}

// sample asks for one container and returns its metrics.
func (c *collector) sample(ctx context.Context, known *container, start time.Time) ([]metric, error) {
	body, windows, err := c.engine.stats(ctx, known.id)
	if err != nil {
		var status *docker.Error
		if errors.As(err, &status) && status.Status >= 500 {
			// So say engines with one-shot of a container that has just stopped, too.
			if now, inspectErr := c.engine.inspect(ctx, known.id); isGone(inspectErr) || inspectErr == nil && !now.State.Running {
				return nil, errStopped
			}
		}
		return nil, err
	}
	stats, err := decodeStats(body)
	if err != nil {
		return nil, err
	}
	path := c.rule.path(known.name)
	metrics := stats.flatten(path, windows)

	if known.restarted {
		now, err := c.engine.inspect(ctx, known.id)
		if err != nil {
			return metrics, fmt.Errorf("its uptime: %w", err)
		}
		known.startedAt = now.State.StartedAt
	}
	known.checkedAt = start
	if !known.startedAt.IsZero() {
		up := max(start.Sub(known.startedAt), 0) // the engine's clock can be ahead of ours
		metrics = append(metrics, metric{path + ".uptime", uint64(up / time.Second), start.Unix()})
	}
	return metrics, nil
}

// stats is what is used of a stats answer. What the engine did not send is nil.
// https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerStats
type stats struct {
	Read time.Time `json:"read"`
	CPU  struct {
		Usage struct {
			Total  *uint64 `json:"total_usage"`         // ns; Windows: 100 ns
			Kernel *uint64 `json:"usage_in_kernelmode"` // the same
			User   *uint64 `json:"usage_in_usermode"`   // the same
		} `json:"cpu_usage"`
		System *uint64 `json:"system_cpu_usage"` // ns
	} `json:"cpu_stats"`
	Memory struct {
		Usage    *uint64 `json:"usage"`
		MaxUsage *uint64 `json:"max_usage"`
		Limit    *uint64 `json:"limit"`
		Stats    struct {
			TotalCache *uint64 `json:"total_cache"` // cgroup v1
			Cache      *uint64 `json:"cache"`       // cgroup v1, without its children
			File       *uint64 `json:"file"`        // cgroup v2
		} `json:"stats"`
	} `json:"memory_stats"` // bytes
	Networks map[string]network `json:"networks"`
	Network  *network           `json:"network"` // before API 1.21
}

// network counts what went through one interface.
type network struct {
	RxBytes   *uint64 `json:"rx_bytes"`
	RxPackets *uint64 `json:"rx_packets"`
	RxErrors  *uint64 `json:"rx_errors"`
	RxDropped *uint64 `json:"rx_dropped"`
	TxBytes   *uint64 `json:"tx_bytes"`
	TxPackets *uint64 `json:"tx_packets"`
	TxErrors  *uint64 `json:"tx_errors"`
	TxDropped *uint64 `json:"tx_dropped"`
}

// decodeStats reads a stats answer. One of a container that does not run, which has no
// time or, from Podman, nothing in it, is errStopped.
func decodeStats(body []byte) (*stats, error) {
	if len(body) == 0 {
		return nil, errStopped
	}
	var s stats
	err := json.Unmarshal(body, &s)
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &kind) && kind.Field == "":
		return nil, rubbish{fmt.Errorf("its stats answer is a JSON %s, not an object", kind.Value)}
	case errors.As(err, &kind):
		return nil, rubbish{fmt.Errorf("its stats answer has %s for %s", kind.Value, kind.Field)}
	case err != nil:
		return nil, rubbish{fmt.Errorf("its stats answer is not JSON: %w", err)}
	case s.Read.IsZero():
		return nil, errStopped
	}
	return &s, nil
}

// flatten makes metrics of s, under path. What is not there is not sent: absent is not 0.
func (s *stats) flatten(path string, windows bool) []metric {
	metrics := make([]metric, 0, 20) // all of them, and the uptime
	at := s.Read.Unix()
	add := func(name string, value *uint64) {
		if value != nil {
			metrics = append(metrics, metric{path + name, *value, at})
		}
	}

	cpu := s.CPU.Usage
	if windows {
		cpu.Total, cpu.Kernel, cpu.User = times100(cpu.Total), times100(cpu.Kernel), times100(cpu.User)
	}
	add(".cpu.total", cpu.Total)
	add(".cpu.kernel", cpu.Kernel)
	add(".cpu.user", cpu.User)
	add(".cpu.system", s.CPU.System)

	memory := s.Memory
	cache := firstOf(memory.Stats.TotalCache, memory.Stats.Cache, memory.Stats.File)
	add(".memory.usage", memory.Usage)
	add(".memory.limit", memory.Limit)
	add(".memory.max_usage", memory.MaxUsage)
	add(".memory.cache", cache)
	if memory.Usage != nil && cache != nil {
		active := *memory.Usage - min(*cache, *memory.Usage)
		add(".memory.active", &active)
	}

	total := s.totalNetwork()
	add(".network.rx_bytes", total.RxBytes)
	add(".network.rx_packets", total.RxPackets)
	add(".network.rx_errors", total.RxErrors)
	add(".network.rx_dropped", total.RxDropped)
	add(".network.tx_bytes", total.TxBytes)
	add(".network.tx_packets", total.TxPackets)
	add(".network.tx_errors", total.TxErrors)
	add(".network.tx_dropped", total.TxDropped)
	return metrics
}

// totalNetwork returns the sums over all interfaces.
func (s *stats) totalNetwork() network {
	var total network
	if len(s.Networks) == 0 && s.Network != nil {
		return *s.Network
	}
	for _, n := range s.Networks {
		total.RxBytes = sum(total.RxBytes, n.RxBytes)
		total.RxPackets = sum(total.RxPackets, n.RxPackets)
		total.RxErrors = sum(total.RxErrors, n.RxErrors)
		total.RxDropped = sum(total.RxDropped, n.RxDropped)
		total.TxBytes = sum(total.TxBytes, n.TxBytes)
		total.TxPackets = sum(total.TxPackets, n.TxPackets)
		total.TxErrors = sum(total.TxErrors, n.TxErrors)
		total.TxDropped = sum(total.TxDropped, n.TxDropped)
	}
	return total
}

func sum(a, b *uint64) *uint64 {
	if a == nil || b == nil {
		return firstOf(a, b)
	}
	total := *a + *b
	return &total
}

func times100(a *uint64) *uint64 {
	if a == nil {
		return nil
	}
	product := *a * 100
	return &product
}

// firstOf returns the first of its arguments that is there.
func firstOf(values ...*uint64) *uint64 {
	for _, value := range values {
		if value != nil {
			return value
		}
	}
	return nil
}

// isGone tells whether err says that a container does not run any more.
func isGone(err error) bool {
	var removed *docker.NoSuchContainer
	return errors.Is(err, errStopped) || errors.As(err, &removed)
}

// isConnectionError tells whether err came before there was an answer, but not for want of
// time: the container it came with may have nothing to do with it.
func isConnectionError(err error) bool {
	var (
		status *docker.Error
		late   noAnswer
		body   rubbish
	)
	return err != nil && !isGone(err) && !errors.As(err, &status) && !errors.As(err, &late) && !errors.As(err, &body)
}

// errorText is err in one line, "" if it is nil.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return oneLine(err.Error())
}
