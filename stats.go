package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	fastjson "github.com/segmentio/encoding/json"
)

// stats is the part of a stats answer that is used: see engine.stats.
type stats struct {
	Read     *time.Time         `json:"read"`
	NumProcs uint64             `json:"num_procs"` // CPUs, Windows only
	CPU      cpuStats           `json:"cpu_stats"`
	Memory   memoryStats        `json:"memory_stats"`
	Networks map[string]network `json:"networks"`
	Network  *network           `json:"network"` // before API 1.21
	Blkio    struct {
		Bytes []blkioEntry `json:"io_service_bytes_recursive"`
		Ops   []blkioEntry `json:"io_serviced_recursive"` // cgroup v1
	} `json:"blkio_stats"`
	Storage struct { // Windows
		ReadBytes  count `json:"read_size_bytes"`
		WriteBytes count `json:"write_size_bytes"`
		ReadOps    count `json:"read_count_normalized"`
		WriteOps   count `json:"write_count_normalized"`
	} `json:"storage_stats"`
	Pids struct {
		Current count `json:"current"`
		Limit   count `json:"limit"`
	} `json:"pids_stats"`
}

type cpuStats struct {
	Usage struct {
		Total  count    `json:"total_usage"`         // ns; Windows: 100 ns
		Kernel count    `json:"usage_in_kernelmode"` // the same
		User   count    `json:"usage_in_usermode"`   // the same
		Cores  []uint64 `json:"percpu_usage"`        // ns, cgroup v1
	} `json:"cpu_usage"`
	System     count `json:"system_cpu_usage"` // ns
	Online     count `json:"online_cpus"`      // since API 1.27
	Throttling struct {
		Periods          count `json:"periods"`
		ThrottledPeriods count `json:"throttled_periods"`
		ThrottledTime    count `json:"throttled_time"` // ns
	} `json:"throttling_data"`
}

// memoryStats are in bytes, if nothing else is said.
type memoryStats struct {
	Usage    count `json:"usage"`
	MaxUsage count `json:"max_usage"` // cgroup v1
	Limit    count `json:"limit"`
	Failcnt  count `json:"failcnt"`
	Stats    struct {
		// cgroup v1 has each of these for the group and, as total_…, with its children.
		TotalCache        count `json:"total_cache"`
		Cache             count `json:"cache"`
		TotalRSS          count `json:"total_rss"`
		RSS               count `json:"rss"`
		TotalSwap         count `json:"total_swap"`
		Swap              count `json:"swap"`
		TotalInactiveFile count `json:"total_inactive_file"`
		InactiveFile      count `json:"inactive_file"` // cgroup v2 too
		TotalPgfault      count `json:"total_pgfault"` // pages
		Pgfault           count `json:"pgfault"`       // cgroup v2 too
		TotalPgmajfault   count `json:"total_pgmajfault"`
		Pgmajfault        count `json:"pgmajfault"` // cgroup v2 too
		File              count `json:"file"`       // cgroup v2
		Anon              count `json:"anon"`       // cgroup v2
	} `json:"stats"`
	// Windows
	Commit            count `json:"commitbytes"`
	CommitPeak        count `json:"commitpeakbytes"`
	PrivateWorkingSet count `json:"privateworkingset"`
}

// network counts what went through one interface.
type network struct {
	RxBytes   count `json:"rx_bytes"`
	RxPackets count `json:"rx_packets"`
	RxErrors  count `json:"rx_errors"`
	RxDropped count `json:"rx_dropped"`
	TxBytes   count `json:"tx_bytes"`
	TxPackets count `json:"tx_packets"`
	TxErrors  count `json:"tx_errors"`
	TxDropped count `json:"tx_dropped"`
}

// blkioEntry counts one kind of operation on one device.
type blkioEntry struct {
	Major uint64 `json:"major"`
	Minor uint64 `json:"minor"`
	Op    string `json:"op"` // read, write and others; cgroup v1 writes them with a capital
	Value uint64 `json:"value"`
}

// decodeStats reads a stats answer. It returns errStopped for a container that does not run:
// that answer has no time or, from Podman, nothing in it.
func decodeStats(body []byte) (*stats, error) {
	if len(body) == 0 {
		return nil, errStopped
	}
	var s stats
	err := fastjson.Unmarshal(body, &s)
	if err != nil { // encoding/json has the better errors
		s = stats{}
		err = json.Unmarshal(body, &s)
	}
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &kind) && kind.Field == "":
		return nil, rubbish{fmt.Errorf("its stats answer is a JSON %s, not an object", kind.Value)}
	case errors.As(err, &kind):
		return nil, rubbish{fmt.Errorf("its stats answer has %s for %s", kind.Value, kind.Field)}
	case err != nil:
		return nil, rubbish{fmt.Errorf("its stats answer is not JSON: %w", err)}
	case s.Read == nil:
		return nil, rubbish{errors.New("its stats answer has no time of reading")}
	case s.Read.IsZero():
		return nil, errStopped
	case s.Read.Unix() <= 0:
		return nil, rubbish{fmt.Errorf("its stats answer is of %s", s.Read)}
	}
	return &s, nil
}

// details says which of the finer series to send.
type details struct{ core, iface, device bool }

// parseDetails reads a list such as "core,device"; an empty one asks for none.
func parseDetails(list string) (per details, err error) {
	for name := range strings.SplitSeq(list, ",") {
		switch strings.TrimSpace(name) {
		case "core":
			per.core = true
		case "interface":
			per.iface = true
		case "device":
			per.device = true
		case "":
		default:
			return per, fmt.Errorf("there are no series per %s; "+
				"write core, interface, device, or several of them with commas between", shown(name))
		}
	}
	return per, nil
}

// flatten adds the metrics of s to f, under path. What is absent is not sent: it is not 0.
func (s *stats) flatten(f *flattener, path string, from origin, per details) {
	f.path, f.at = path, s.Read.Unix()
	f.cpu(&s.CPU, from.windows, per.core)
	f.memory(&s.Memory)
	f.networks(s, per.iface)
	f.blkio(s, per.device)
	f.add(".pids.current", s.Pids.Current)
	if limit := s.Pids.Limit; limit.n != 0 && limit.n != math.MaxUint64 { // both mean unlimited
		f.add(".pids.limit", limit)
	}
}

// flattener collects the metrics of one container, or of the host.
type flattener struct {
	metrics []metric
	path    string
	at      int64 // Unix seconds
}

// add adds a metric, unless it has no value.
func (f *flattener) add(name string, c count) {
	if c.sent {
		f.metrics = append(f.metrics, metric{f.path, name, whole(c.n), f.at})
	}
}

// addCount adds a number that this program has counted.
func (f *flattener) addCount(name string, n int) {
	f.metrics = append(f.metrics, metric{f.path, name, whole(uint64(n)), f.at})
}

// addDecimal adds a metric with up to three decimals, unless number is not fit for that.
func (f *flattener) addDecimal(name string, number float64) {
	if v, ok := decimal(number); ok {
		f.metrics = append(f.metrics, metric{f.path, name, v, f.at})
	}
}

func (f *flattener) cpu(cpu *cpuStats, windows, perCore bool) {
	total, kernel, user := cpu.Usage.Total, cpu.Usage.Kernel, cpu.Usage.User
	if windows {
		total, kernel, user = times100(total), times100(kernel), times100(user)
	}
	f.add(".cpu.total", total)
	f.add(".cpu.kernel", kernel)
	f.add(".cpu.user", user)
	f.add(".cpu.system", cpu.System)
	if online := cpu.online(); online > 0 {
		f.add(".cpu.online", counted(online))
	}
	f.add(".cpu.throttling.periods", cpu.Throttling.Periods)
	f.add(".cpu.throttling.throttled_periods", cpu.Throttling.ThrottledPeriods)
	f.add(".cpu.throttling.throttled_time", cpu.Throttling.ThrottledTime)
	if perCore {
		for i, core := range cpu.Usage.Cores {
			f.add(".cpu.core."+strconv.Itoa(i), counted(core))
		}
	}
}

// online returns how many CPUs the engine has, 0 if it does not tell.
func (cpu *cpuStats) online() uint64 {
	if cpu.Online.n > 0 {
		return cpu.Online.n
	}
	return uint64(len(cpu.Usage.Cores))
}

func (f *flattener) memory(m *memoryStats) {
	f.add(".memory.usage", m.Usage)
	f.add(".memory.limit", m.Limit)
	f.add(".memory.max_usage", m.MaxUsage)
	cache := firstOf(m.Stats.TotalCache, m.Stats.Cache, m.Stats.File)
	f.add(".memory.cache", cache)
	if m.Usage.sent && cache.sent {
		f.add(".memory.active", counted(m.Usage.n-min(cache.n, m.Usage.n)))
	}
	workingSet := m.workingSet()
	f.add(".memory.working_set", workingSet)
	if workingSet.sent && m.Limit.n > 0 {
		f.addDecimal(".memory.percent", float64(workingSet.n)/float64(m.Limit.n)*100)
	}
	f.add(".memory.rss", firstOf(m.Stats.TotalRSS, m.Stats.RSS, m.Stats.Anon))
	f.add(".memory.swap", firstOf(m.Stats.TotalSwap, m.Stats.Swap))
	f.add(".memory.failcnt", m.Failcnt)
	f.add(".memory.pgfault", firstOf(m.Stats.TotalPgfault, m.Stats.Pgfault))
	f.add(".memory.pgmajfault", firstOf(m.Stats.TotalPgmajfault, m.Stats.Pgmajfault))
	f.add(".memory.commit", m.Commit)
	f.add(".memory.commit_peak", m.CommitPeak)
	f.add(".memory.private_working_set", m.PrivateWorkingSet)
}

// workingSet is what `docker stats` shows as memory in use.
// https://github.com/docker/cli/blob/master/cli/command/container/stats_helpers.go
func (m *memoryStats) workingSet() count {
	if m.PrivateWorkingSet.sent {
		return m.PrivateWorkingSet
	}
	for _, inactive := range [...]count{m.Stats.TotalInactiveFile, m.Stats.InactiveFile} {
		if inactive.sent && inactive.n < m.Usage.n {
			return counted(m.Usage.n - inactive.n)
		}
	}
	return m.Usage
}

func (f *flattener) networks(s *stats, perInterface bool) {
	if len(s.Networks) == 0 {
		if s.Network != nil {
			f.network(".network", s.Network)
		}
		return
	}
	var total network
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
	f.network(".network", &total)
	if !perInterface {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(s.Networks)) {
		if node := graphiteNode(name); node != "" {
			n := s.Networks[name]
			f.network(".network."+node, &n)
		}
	}
}

func (f *flattener) network(path string, n *network) {
	for _, c := range [...]struct {
		name string // whole, so that the usual path needs no allocation
		count
	}{
		{".network.rx_bytes", n.RxBytes}, {".network.rx_packets", n.RxPackets},
		{".network.rx_errors", n.RxErrors}, {".network.rx_dropped", n.RxDropped},
		{".network.tx_bytes", n.TxBytes}, {".network.tx_packets", n.TxPackets},
		{".network.tx_errors", n.TxErrors}, {".network.tx_dropped", n.TxDropped},
	} {
		name := c.name
		if path != ".network" {
			name = path + strings.TrimPrefix(name, ".network")
		}
		f.add(name, c.count)
	}
}

func (f *flattener) blkio(s *stats, perDevice bool) {
	bytes, ops := s.Blkio.Bytes, s.Blkio.Ops
	f.add(".blkio.read_bytes", firstOf(sumOf(bytes, "read", nil), s.Storage.ReadBytes))
	f.add(".blkio.write_bytes", firstOf(sumOf(bytes, "write", nil), s.Storage.WriteBytes))
	f.add(".blkio.read_ops", firstOf(sumOf(ops, "read", nil), s.Storage.ReadOps))
	f.add(".blkio.write_ops", firstOf(sumOf(ops, "write", nil), s.Storage.WriteOps))
	if !perDevice {
		return
	}
	done := map[device]bool{}
	for _, entry := range slices.Concat(bytes, ops) {
		d := device{entry.Major, entry.Minor}
		if done[d] {
			continue
		}
		done[d] = true
		path := fmt.Sprintf(".blkio.%d_%d", d.major, d.minor)
		f.add(path+".read_bytes", sumOf(bytes, "read", &d))
		f.add(path+".write_bytes", sumOf(bytes, "write", &d))
		f.add(path+".read_ops", sumOf(ops, "read", &d))
		f.add(path+".write_ops", sumOf(ops, "write", &d))
	}
}

type device struct{ major, minor uint64 }

// sumOf adds up the entries of an operation, on one device or, with nil, on all. The sum counts as
// not sent if the engine sent no array. It is 0 if the array has no such entry: nothing was done
// yet. Other operations, such as Total and Sync, repeat what read and write have.
func sumOf(entries []blkioEntry, op string, on *device) count {
	if entries == nil {
		return count{}
	}
	var total uint64
	for _, entry := range entries {
		if strings.EqualFold(entry.Op, op) && (on == nil || *on == device{entry.Major, entry.Minor}) {
			total += entry.Value
		}
	}
	return counted(total)
}

// cpuSample is kept until a container's next sample, to make a percentage of the two.
type cpuSample struct {
	startedAt time.Time // the container
	read      time.Time
	total     uint64 // ns; Windows: 100 ns
	system    uint64 // ns
	cpus      uint64
}

// cpuSample returns nil if the engine sent no CPU time.
func (s *stats) cpuSample(startedAt time.Time, from origin) *cpuSample {
	if !s.CPU.Usage.Total.sent {
		return nil
	}
	sample := &cpuSample{startedAt, *s.Read, s.CPU.Usage.Total.n, s.CPU.System.n, s.CPU.online()}
	if from.windows {
		sample.cpus = s.NumProcs
	}
	return sample
}

// percentSince returns how much CPU the container used since an earlier sample, by the formula of
// `docker stats`: 100 is one full CPU, on Windows all of them. ok is false after a restart, or if
// a clock did not go forward.
// https://github.com/docker/cli/blob/master/cli/command/container/stats_helpers.go
func (now *cpuSample) percentSince(before *cpuSample, from origin) (percent float64, ok bool) {
	if before == nil || now == nil || !now.startedAt.Equal(before.startedAt) {
		return 0, false
	}
	if now.total < before.total || !now.read.After(before.read) {
		return 0, false
	}
	used := float64(now.total - before.total)
	elapsed := float64(now.read.Sub(before.read)) // ns
	switch {
	case from.windows:
		percent = used / (elapsed / 100 * float64(now.cpus)) * 100
	case from.podman:
		// Its system_cpu_usage is what all CPUs were used, not what they could give.
		percent = used / elapsed * 100
	case now.system > before.system:
		percent = used / float64(now.system-before.system) * float64(now.cpus) * 100
	default:
		return 0, false
	}
	return percent, true
}

func sum(a, b count) count {
	return count{a.n + b.n, a.sent || b.sent}
}

func times100(c count) count { return count{c.n * 100, c.sent} }

// firstOf returns the first of its arguments that was sent.
func firstOf(counts ...count) count {
	for _, c := range counts {
		if c.sent {
			return c
		}
	}
	return count{}
}
