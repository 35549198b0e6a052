package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

// row is a row of the dashboard. Its panels stand side by side; a line of them is 24 wide.
type row struct {
	title  string
	panels []panel
}

// panel is a graph of lines, or of bars, or a number.
type panel struct {
	title         string
	about         string
	unit          string // by Grafana's name
	width, height uint32
	max           float64 // 0: what the data have
	bars          bool
	number        *number
	queries       []string
}

// number says how a panel shows a number instead of a graph.
type number struct {
	reduce  string // the points to one
	colours []dashboard.Threshold
	words   map[string]dashboard.ValueMappingResult
	none    string // without a point
}

func from(value float64, colour string) dashboard.Threshold {
	return dashboard.Threshold{Value: &value, Color: colour}
}

func atFirst(colour string) dashboard.Threshold { return dashboard.Threshold{Color: colour} }

func word(index int32, text, colour string) dashboard.ValueMappingResult {
	return dashboard.ValueMappingResult{Text: &text, Color: &colour, Index: cog.ToPtr(index)}
}

const (
	ofHost = "The containers whose names in Graphite begin with this host; if there are none, " +
		"all containers. "
	busiest = "aliasSub(highestAverage(fallbackSeries($prefix.$host.**.cpu.percent, " +
		`$prefix.**.cpu.percent), 10), '$prefix\.(.*)\.cpu\.percent', '\1')`
	largest = "aliasSub(highestAverage(fallbackSeries($prefix.$host.**.memory.working_set, " +
		`$prefix.**.memory.working_set), 10), '$prefix\.(.*)\.memory\.working_set', '\1')`
	heldBack = "alias(asPercent(perSecond($prefix.$container.cpu.throttling.throttled_periods), " +
		"perSecond($prefix.$container.cpu.throttling.periods)), 'of the periods of its limit')"
)

// grew counts what happened in the container between two points.
func grew(counter, legend string) string {
	return "alias(consolidateBy(nonNegativeDerivative($prefix.$container." + counter +
		"), 'sum'), '" + legend + "')"
}

// happened counts events of the host between two points.
func happened(event, legend string) string {
	return "alias(consolidateBy(nonNegativeDerivative($prefix.$host.events." + event +
		"), 'sum'), '" + legend + "')"
}

var rows = []row{
	{"Host $host", []panel{
		{title: "Containers", unit: "short", width: 4, height: 8, number: &number{reduce: "lastNotNull"},
			queries: []string{
				"alias($prefix.$host.containers.running, 'running')",
				"alias($prefix.$host.containers.paused, 'paused')",
				"alias($prefix.$host.containers.stopped, 'stopped')"}},
		{title: "CPU, the busiest ten", about: ofHost + "100 % is one full CPU.",
			unit: "percent", width: 10, height: 8, queries: []string{busiest}},
		{title: "Memory, the largest ten", about: ofHost + "The working set, as docker stats shows it.",
			unit: "bytes", width: 10, height: 8, queries: []string{largest}},
		{title: "Containers that started and ended", about: "Also those that no poll saw.",
			unit: "short", width: 12, height: 8, bars: true, queries: []string{
				happened("start", "started"), happened("die", "ended"),
				happened("die_nonzero", "ended with an error")}},
		{title: "OOM kills, unhealthy", about: "Of all containers of the host.",
			unit: "short", width: 12, height: 8, bars: true, queries: []string{
				happened("oom", "OOM kills"), happened("unhealthy", "became unhealthy")}},
	}},
	{"Container $container", []panel{
		{title: "Uptime", unit: "s", width: 6, height: 4, number: &number{reduce: "lastNotNull"},
			queries: []string{"alias($prefix.$container.uptime, 'uptime')"}},
		{title: "Health", unit: "none", width: 6, height: 4,
			number: &number{
				reduce:  "lastNotNull",
				colours: []dashboard.Threshold{atFirst("red"), from(1, "green")},
				words: map[string]dashboard.ValueMappingResult{"1": word(0, "healthy", "green"),
					"0": word(1, "unhealthy", "red")},
				none: "no health check",
			},
			queries: []string{"alias($prefix.$container.health, 'health')"}},
		{title: "Restarts", about: "By its restart policy, in the time that is shown.",
			unit: "short", width: 6, height: 4,
			number: &number{reduce: "sum",
				colours: []dashboard.Threshold{atFirst("green"), from(1, "red")}},
			queries: []string{grew("restarts", "restarts")}},
		{title: "Memory now, of its limit", unit: "percent", width: 6, height: 4,
			number: &number{reduce: "lastNotNull",
				colours: []dashboard.Threshold{atFirst("green"), from(80, "orange"), from(95, "red")}},
			queries: []string{"alias($prefix.$container.memory.percent, 'memory')"}},
		{title: "CPU", about: "100 % is one full CPU.", unit: "percent", width: 12, height: 8,
			queries: []string{
				"alias(scale(perSecond($prefix.$container.cpu.total), 0.0000001), 'total')",
				"alias(scale(perSecond($prefix.$container.cpu.user), 0.0000001), 'user')",
				"alias(scale(perSecond($prefix.$container.cpu.kernel), 0.0000001), 'kernel')",
				"alias(scale($prefix.$container.cpu.limit, 100), 'limit')"}},
		{title: "CPU, held back by its limit",
			about: "The share of its CPU periods in which it had to wait. Empty without a limit.",
			unit:  "percent", width: 12, height: 8, max: 100, queries: []string{heldBack}},
		{title: "Memory against its limit",
			about: "Without a limit of its own, the limit is the host's memory.",
			unit:  "bytes", width: 12, height: 8, queries: []string{
				"alias($prefix.$container.memory.working_set, 'working set')",
				"alias($prefix.$container.memory.cache, 'page cache')",
				"alias($prefix.$container.memory.limit, 'limit')"}},
		{title: "Memory, of its limit", unit: "percent", width: 12, height: 8,
			queries: []string{"alias($prefix.$container.memory.percent, 'working set')"}},
		{title: "Network",
			about: "Bits a second, over all interfaces. Empty without a network of its own.",
			unit:  "bps", width: 12, height: 8, queries: []string{
				"alias(scale(perSecond($prefix.$container.network.rx_bytes), 8), 'received')",
				"alias(scale(perSecond($prefix.$container.network.tx_bytes), 8), 'sent')"}},
		{title: "Network, errors and dropped packets", unit: "pps", width: 12, height: 8,
			queries: []string{
				"alias(perSecond($prefix.$container.network.rx_errors), 'received: errors')",
				"alias(perSecond($prefix.$container.network.tx_errors), 'sent: errors')",
				"alias(perSecond($prefix.$container.network.rx_dropped), 'received: dropped')",
				"alias(perSecond($prefix.$container.network.tx_dropped), 'sent: dropped')"}},
		{title: "Disk", about: "Bytes a second, over all block devices.",
			unit: "Bps", width: 12, height: 8, queries: []string{
				"alias(perSecond($prefix.$container.blkio.read_bytes), 'read')",
				"alias(perSecond($prefix.$container.blkio.write_bytes), 'written')"}},
		{title: "Processes and threads", unit: "short", width: 6, height: 8, queries: []string{
			"alias($prefix.$container.pids.current, 'now')",
			"alias($prefix.$container.pids.limit, 'limit')"}},
		{title: "Restarts, OOM kills, failed exits",
			about: "OOM kills and failed exits also of containers that are gone, under this name.",
			unit:  "short", width: 6, height: 8, bars: true, queries: []string{
				grew("restarts", "restarts"), grew("oom_kills", "OOM kills"),
				grew("failed_exits", "ended with an error")}},
	}},
	{"docker-stats-to-backstop on $host", []panel{
		{title: "Time a poll takes", unit: "ns", width: 6, height: 8,
			queries: []string{"alias($prefix.$host.metrics.duration, 'poll')"}},
		{title: "Containers at a poll", unit: "short", width: 6, height: 8, queries: []string{
			"alias($prefix.$host.metrics.sampled, 'read')",
			"alias($prefix.$host.metrics.failed, 'could not be read')",
			"alias($prefix.$host.metrics.collisions, 'left out: name taken')"}},
		{title: "Waiting to be delivered",
			about: "What an outage of Backstop or Carbon left waiting. These points wait too: they " +
				"appear when it is over.",
			unit: "bytes", width: 6, height: 8,
			queries: []string{"alias($prefix.$host.metrics.spooled, 'waiting')"}},
		{title: "Metrics a second", about: "Dropped metrics are lost; the log says why.",
			unit: "cps", width: 6, height: 8, queries: []string{
				"alias(perSecond($prefix.$host.metrics.sent), 'sent')",
				"alias(perSecond($prefix.$host.metrics.retried), 'sent again')",
				"alias(perSecond($prefix.$host.metrics.dropped), 'dropped')"}},
	}},
}
