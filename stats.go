package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// stats is what is used of a stats answer.
type stats struct {
	Read     *time.Time         `json:"read"`
	OSType   string             `json:"os_type"` // since API 1.52
	CPU      cpuStats           `json:"cpu_stats"`
	Memory   memoryStats        `json:"memory_stats"`
	Networks map[string]network `json:"networks"`
	Network  *network           `json:"network"` // before API 1.21
	Blkio    blkioStats         `json:"blkio_stats"`
	Storage  diskIO             `json:"storage_stats"` // Windows
	Pids     struct {
		Current count `json:"current"`
		Limit   count `json:"limit"`
	} `json:"pids_stats"`
}

type cpuStats struct {
	Usage struct {
		Total  count   `json:"total_usage"`         // ns; Windows: 100 ns
		Kernel count   `json:"usage_in_kernelmode"` // the same
		User   count   `json:"usage_in_usermode"`   // the same
		Cores  []count `json:"percpu_usage"`        // ns, cgroup v1; all that are possible
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
		memoryTotals
		Cache        count `json:"cache"`
		RSS          count `json:"rss"`
		Swap         count `json:"swap"`
		InactiveFile count `json:"inactive_file"` // cgroup v2 too
		Pgfault      count `json:"pgfault"`       // pages; cgroup v2 too
		Pgmajfault   count `json:"pgmajfault"`    // the same
		File         count `json:"file"`          // cgroup v2
		Anon         count `json:"anon"`          // cgroup v2
	} `json:"stats"`
	// Windows
	Commit            count `json:"commitbytes"`
	CommitPeak        count `json:"commitpeakbytes"`
	PrivateWorkingSet count `json:"privateworkingset"`
}

// memoryTotals are those of cgroup v1, of a group with its children.
type memoryTotals struct {
	TotalCache        count `json:"total_cache"`
	TotalRSS          count `json:"total_rss"`
	TotalSwap         count `json:"total_swap"`
	TotalInactiveFile count `json:"total_inactive_file"`
	TotalPgfault      count `json:"total_pgfault"` // pages
	TotalPgmajfault   count `json:"total_pgmajfault"`
}

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

// counts returns all of n, in the order of networkNames.
func (n *network) counts() [8]*count {
	return [...]*count{&n.RxBytes, &n.RxPackets, &n.RxErrors, &n.RxDropped,
		&n.TxBytes, &n.TxPackets, &n.TxErrors, &n.TxDropped}
}

var networkNames = [8]string{".network.rx_bytes", ".network.rx_packets", ".network.rx_errors",
	".network.rx_dropped", ".network.tx_bytes", ".network.tx_packets", ".network.tx_errors",
	".network.tx_dropped"}

// blkioStats lists operations on block devices. What was not sent is nil.
type blkioStats struct {
	Bytes []blkioEntry `json:"io_service_bytes_recursive"`
	Ops   []blkioEntry `json:"io_serviced_recursive"` // cgroup v1
}

type blkioEntry struct {
	Major count  `json:"major"`
	Minor count  `json:"minor"`
	Op    string `json:"op"` // read, write and others; cgroup v1 writes them with a capital
	Value count  `json:"value"`
}

// diskIO counts what went through block devices, as Windows sends it.
type diskIO struct {
	ReadBytes  count `json:"read_size_bytes"`
	WriteBytes count `json:"write_size_bytes"`
	ReadOps    count `json:"read_count_normalized"`
	WriteOps   count `json:"write_count_normalized"`
}

// decodeStats reads a stats answer. A value of another type than its field costs that field. It
// returns errStopped for a container that does not run: that answer has no time or, from Podman,
// nothing in it.
func decodeStats(body []byte) (*stats, error) {
	if len(body) == 0 {
		return nil, errStopped
	}
	var s stats
	err := decodeLoosely(body, &s)
	switch {
	case err != nil:
		return nil, fmt.Errorf("its stats answer is not what was asked for: %w", err)
	case s.Read == nil:
		return nil, errNoTime
	case s.Read.IsZero():
		return nil, errStopped
	}
	return &s, nil
}

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
			return per, fmt.Errorf("there are no series per %s; write core, interface, device, "+
				"or several of them with commas between", shown(name))
		}
	}
	return per, nil
}

// flatten adds the metrics of s to f. What is absent is not sent: it is not 0.
func (s *stats) flatten(f *flattener, from origin, per details) {
	from = s.origin(from)
	f.cpu(&s.CPU, from, per.core)
	f.memory(&s.Memory, from)
	f.networks(s, per.iface)
	f.blkio(s, from, per.device)
	f.add(".pids.current", s.Pids.Current)
	if limit := s.Pids.Limit; limit.n != 0 { // 0 means unlimited, and so does 2^64 - 1
		f.add(".pids.limit", limit)
	}
}

// origin returns from with what the answer itself tells: of Windows, and the CPUs that are online.
func (s *stats) origin(from origin) origin {
	from.windows = from.windows || s.OSType == "windows"
	if online := s.CPU.Online; online.sent && online.n > 0 {
		from.cpus = online.n
	}
	return from
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

func (f *flattener) addCount(name string, n int) {
	f.metrics = append(f.metrics, metric{f.path, name, whole(uint64(n)), f.at})
}

// addDecimal adds a metric with up to three decimals, unless number is not fit for that.
func (f *flattener) addDecimal(name string, number float64) {
	if v, ok := decimal(number); ok {
		f.metrics = append(f.metrics, metric{f.path, name, v, f.at})
	}
}

func (f *flattener) cpu(cpu *cpuStats, from origin, perCore bool) {
	total, kernel, user := cpu.Usage.Total, cpu.Usage.Kernel, cpu.Usage.User
	if from.windows {
		total, kernel, user = times100(total), times100(kernel), times100(user)
	}
	f.add(".cpu.total", total)
	f.add(".cpu.kernel", kernel)
	f.add(".cpu.user", user)
	f.add(".cpu.system", cpu.System)
	if from.cpus > 0 {
		f.add(".cpu.online", counted(from.cpus))
	}
	f.add(".cpu.throttling.periods", cpu.Throttling.Periods)
	f.add(".cpu.throttling.throttled_periods", cpu.Throttling.ThrottledPeriods)
	f.add(".cpu.throttling.throttled_time", cpu.Throttling.ThrottledTime)
	if !perCore {
		return
	}
	for i, core := range cpu.Usage.Cores {
		if uint64(i) < from.cpus || core.n > 0 { // others may only be possible
			f.add(".cpu.core."+strconv.Itoa(i), core)
		}
	}
}

func (f *flattener) memory(m *memoryStats, from origin) {
	f.add(".memory.usage", m.Usage)
	limit := m.Limit
	if from.memory > 0 && limit.n > from.memory {
		limit = counted(from.memory)
	}
	f.add(".memory.limit", limit)
	f.add(".memory.max_usage", m.MaxUsage)
	cache := firstOf(m.Stats.TotalCache, m.Stats.Cache, m.Stats.File)
	f.add(".memory.cache", cache)
	if m.Usage.sent && cache.sent {
		f.add(".memory.active", counted(m.Usage.n-min(cache.n, m.Usage.n)))
	}
	workingSet := m.workingSet()
	f.add(".memory.working_set", workingSet)
	if workingSet.sent && limit.sent && limit.n > 0 {
		f.addDecimal(".memory.percent", float64(workingSet.n)/float64(limit.n)*100)
	}
	f.add(".memory.rss", firstOf(m.Stats.TotalRSS, m.Stats.RSS, m.Stats.Anon))
	f.add(".memory.swap", firstOf(m.Stats.TotalSwap, m.Stats.Swap))
	failcnt := m.Failcnt
	if failcnt.absent() && !m.Usage.absent() && !from.podman {
		failcnt = counted(0) // Docker cannot send that, and Podman never counts
	}
	f.add(".memory.failcnt", failcnt)
	f.add(".memory.pgfault", firstOf(m.Stats.TotalPgfault, m.Stats.Pgfault))
	f.add(".memory.pgmajfault", firstOf(m.Stats.TotalPgmajfault, m.Stats.Pgmajfault))
	f.add(".memory.commit", m.Commit)
	f.add(".memory.commit_peak", m.CommitPeak)
	f.add(".memory.private_working_set", m.PrivateWorkingSet)
}

// workingSet is what `docker stats` shows as memory in use.
// https://github.com/docker/cli/blob/master/cli/command/container/stats_helpers.go
func (m *memoryStats) workingSet() count {
	if !m.PrivateWorkingSet.absent() || !m.Usage.sent {
		return m.PrivateWorkingSet
	}
	for _, inactive := range [...]count{m.Stats.TotalInactiveFile, m.Stats.InactiveFile} {
		switch {
		case inactive.broken:
			return inactive
		case inactive.sent && inactive.n < m.Usage.n:
			return counted(m.Usage.n - inactive.n)
		}
	}
	return m.Usage
}

func (f *flattener) networks(s *stats, perInterface bool) {
	var total network
	if len(s.Networks) == 0 && s.Network != nil {
		total = *s.Network
	}
	for _, n := range s.Networks {
		for i, c := range n.counts() {
			*c = sum(*total.counts()[i], *c)
		}
		total = n
	}
	f.network("", &total)
	if !perInterface {
		return
	}
	taken := map[string]bool{"": true}
	for _, name := range slices.Sorted(maps.Keys(s.Networks)) {
		node, n := graphiteNode(name), s.Networks[name]
		if !taken[node] { // eth0.1 and eth0_1 have one name
			f.network(node, &n)
		}
		taken[node] = true
	}
}

func (f *flattener) network(iface string, n *network) {
	for i, c := range n.counts() {
		f.addOf(iface, networkNames[i], *c)
	}
}

// addOf adds a metric of a part, such as "eth0": .network.eth0.rx_bytes. For the whole, that is "",
// it is .network.rx_bytes, and takes no allocation.
func (f *flattener) addOf(part, name string, c count) {
	if part != "" {
		dot := strings.LastIndexByte(name, '.')
		name = name[:dot+1] + part + name[dot:]
	}
	f.add(name, c)
}

func (f *flattener) blkio(s *stats, from origin, perDevice bool) {
	total, storage := s.Blkio.sums(), s.Storage
	var otherwise count
	if from.windows {
		otherwise = counted(0) // Docker cannot send that
	}
	f.diskIO("", diskIO{
		firstOf(total.ReadBytes, storage.ReadBytes, otherwise),
		firstOf(total.WriteBytes, storage.WriteBytes, otherwise),
		firstOf(total.ReadOps, storage.ReadOps, otherwise),
		firstOf(total.WriteOps, storage.WriteOps, otherwise),
	})
	if !perDevice {
		return
	}
	bytes, ops, seen := byDevice(s.Blkio.Bytes), byDevice(s.Blkio.Ops), map[device]bool{}
	for _, entry := range slices.Concat(s.Blkio.Bytes, s.Blkio.Ops) {
		d := device{entry.Major, entry.Minor}
		if d.major.sent && d.minor.sent && !seen[d] {
			on := blkioStats{append(s.Blkio.Bytes[:0:0], bytes[d]...), // nil of nil
				append(s.Blkio.Ops[:0:0], ops[d]...)}
			f.diskIO(fmt.Sprintf("%d_%d", d.major.n, d.minor.n), on.sums())
		}
		seen[d] = true
	}
}

func (f *flattener) diskIO(device string, io diskIO) {
	f.addOf(device, ".blkio.read_bytes", io.ReadBytes)
	f.addOf(device, ".blkio.write_bytes", io.WriteBytes)
	f.addOf(device, ".blkio.read_ops", io.ReadOps)
	f.addOf(device, ".blkio.write_ops", io.WriteOps)
}

type device struct{ major, minor count }

func byDevice(entries []blkioEntry) map[device][]blkioEntry {
	on := map[device][]blkioEntry{}
	for _, entry := range entries {
		d := device{entry.Major, entry.Minor}
		on[d] = append(on[d], entry)
	}
	return on
}

func (b *blkioStats) sums() diskIO {
	return diskIO{
		sumOf(b.Bytes, "read"), sumOf(b.Bytes, "write"),
		sumOf(b.Ops, "read"), sumOf(b.Ops, "write"),
	}
}

// sumOf adds up the entries of an operation. The sum counts as not sent if the engine sent no
// array. It is 0 if the array has no such entry: nothing was done yet. Other operations, such as
// Total and Sync, repeat what read and write have.
func sumOf(entries []blkioEntry, op string) count {
	if entries == nil {
		return count{}
	}
	total := counted(0)
	for i := range entries {
		if strings.EqualFold(entries[i].Op, op) {
			total = sum(total, entries[i].Value)
		}
	}
	return total
}

// cpuSample is kept until a container's next sample, to make a percentage of the two.
type cpuSample struct {
	startedAt time.Time // the container
	read      time.Time // by the engine's clock
	total     uint64    // ns; Windows: 100 ns
	unit      float64   // of total, in ns
}

// cpuSample returns nil if the engine sent no CPU time.
func (s *stats) cpuSample(startedAt time.Time, from origin) *cpuSample {
	total, unit := s.CPU.Usage.Total, 1.0
	if !total.sent {
		return nil
	}
	if s.origin(from).windows {
		unit = 100
	}
	return &cpuSample{startedAt, *s.Read, total.n, unit}
}

// percentSince returns how much CPU the container used since an earlier sample: 100 is one full
// CPU. ok is false after a restart, or if a clock did not go forward.
func (s *cpuSample) percentSince(before *cpuSample) (percent float64, ok bool) {
	if before == nil || s == nil || !s.startedAt.Equal(before.startedAt) ||
		s.total < before.total || !s.read.After(before.read) {
		return 0, false
	}
	used, elapsed := float64(s.total-before.total)*s.unit, float64(s.read.Sub(before.read))
	return used / elapsed * 100, true
}

func sum(a, b count) count {
	switch {
	case a.broken || b.broken:
		return count{broken: true}
	case a.sent || b.sent:
		return counted(a.n + b.n)
	}
	return count{}
}

func times100(c count) count {
	if c.sent {
		return counted(min(c.n, tooLarge/50) * 100) // one that is too large stays so
	}
	return c
}

// firstOf returns the first of its arguments that was sent, be it broken.
func firstOf(counts ...count) count {
	for _, c := range counts {
		if !c.absent() {
			return c
		}
	}
	return count{}
}
