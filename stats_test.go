package main

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// flattened returns the metrics of s, as those of c.
func flattened(s *stats, from origin, per details) []metric {
	var f flattener
	s.flatten(&f, "c", from, per)
	return f.metrics
}

func asLines(metrics []metric) string {
	var lines []byte
	for _, m := range metrics {
		lines = m.appendLine(lines)
	}
	return string(lines)
}

// From an answer of an engine to the lines that Carbon gets, finer series included; `go test -run
// Golden -update` writes the files anew. Answers of containers that do not run have empty ones.
// All were recorded, but for those in windows and api-1.17: these have the shapes that
// Docker's documentation gives.
func TestGoldenMetrics(t *testing.T) {
	answers, err := filepath.Glob("testdata/engine/*/stats-*.json")
	if err != nil || len(answers) < 20 {
		t.Fatalf("recorded answers: %q %v", answers, err)
	}
	for _, file := range answers {
		body, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var got string
		switch stats, err := decodeStats(body); {
		case err == nil:
			got = asLines(flattened(stats, origin{windows: strings.Contains(file, "windows")}, details{true, true, true}))
		case err != errStopped:
			t.Errorf("%s: %v", file, err)
		}
		golden := strings.TrimSuffix(file, ".json") + ".golden"
		if *update {
			if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s makes\n%swant\n%s", file, got, want)
		}
	}
}

func TestAbsentIsNotZero(t *testing.T) {
	const at = `"read":"2026-11-23T04:54:40.9Z",`
	for _, test := range []struct{ why, answer, want string }{
		{"nothing", `{` + at + `"x":1}`, ""},
		{"nulls", `{` + at + `"networks":null,"memory_stats":{"usage":null,"stats":null},"cpu_stats":null}`, ""},
		{"no interfaces", `{` + at + `"networks":{}}`, ""},
		{"a zero that was sent", `{` + at + `"cpu_stats":{"cpu_usage":{"total_usage":0}}}`, "c.cpu.total 0 1795409680\n"},
		{"all digits", `{` + at + `"memory_stats":{"limit":18446744073709551615}}`, "c.memory.limit 18446744073709551615 1795409680\n"},
		{"cgroup v1: the children count", `{` + at + `"memory_stats":{"usage":10,"stats":{"total_cache":4,"cache":1,"file":2,"total_inactive_file":3,"inactive_file":1}}}`,
			"c.memory.usage 10 1795409680\nc.memory.cache 4 1795409680\nc.memory.active 6 1795409680\nc.memory.working_set 7 1795409680\n"},
		{"cgroup v1 of old", `{` + at + `"memory_stats":{"usage":10,"stats":{"cache":1,"rss":2,"swap":3}}}`,
			"c.memory.usage 10 1795409680\nc.memory.cache 1 1795409680\nc.memory.active 9 1795409680\nc.memory.working_set 10 1795409680\nc.memory.rss 2 1795409680\nc.memory.swap 3 1795409680\n"},
		{"more cache than usage", `{` + at + `"memory_stats":{"usage":10,"limit":30,"stats":{"file":11,"inactive_file":11}}}`,
			"c.memory.usage 10 1795409680\nc.memory.limit 30 1795409680\nc.memory.cache 11 1795409680\nc.memory.active 0 1795409680\nc.memory.working_set 10 1795409680\nc.memory.percent 33.333 1795409680\n"},
		{"cache without usage", `{` + at + `"memory_stats":{"stats":{"file":11}}}`, "c.memory.cache 11 1795409680\n"},
		{"no limit, no percentage", `{` + at + `"memory_stats":{"usage":1,"limit":0}}`,
			"c.memory.usage 1 1795409680\nc.memory.limit 0 1795409680\nc.memory.working_set 1 1795409680\n"},
		{"unlimited pids, cgroup v1", `{` + at + `"pids_stats":{"current":3,"limit":0}}`, "c.pids.current 3 1795409680\n"},
		{"unlimited pids, cgroup v2", `{` + at + `"pids_stats":{"current":3,"limit":18446744073709551615}}`, "c.pids.current 3 1795409680\n"},
		{"CPUs that are not told", `{` + at + `"cpu_stats":{"online_cpus":0,"cpu_usage":{"percpu_usage":[]}}}`, ""},
		{"CPUs that are counted", `{` + at + `"cpu_stats":{"cpu_usage":{"percpu_usage":[1,2,0]}}}`, "c.cpu.online 3 1795409680\n"},
		{"no device did anything", `{` + at + `"blkio_stats":{"io_service_bytes_recursive":[],"io_serviced_recursive":null}}`,
			"c.blkio.read_bytes 0 1795409680\nc.blkio.write_bytes 0 1795409680\n"},
		{"reads and writes of all devices", `{` + at + `"blkio_stats":{"io_service_bytes_recursive":[{"major":8,"op":"Read","value":1},{"major":9,"op":"read","value":2},` +
			`{"major":8,"op":"WRITE","value":4},{"major":8,"op":"Sync","value":8},{"major":8,"op":"Async","value":16},{"major":8,"op":"Discard","value":32},{"major":8,"op":"Total","value":64}]}}`,
			"c.blkio.read_bytes 3 1795409680\nc.blkio.write_bytes 4 1795409680\n"},
		{"before API 1.21", `{` + at + `"network":{"rx_bytes":1,"tx_errors":0}}`,
			"c.network.rx_bytes 1 1795409680\nc.network.tx_errors 0 1795409680\n"},
		{"sums over interfaces", `{` + at + `"networks":{"eth0":{"rx_bytes":1,"tx_bytes":5},"eth1":{"rx_bytes":2}}}`,
			"c.network.rx_bytes 3 1795409680\nc.network.tx_bytes 5 1795409680\n"},
	} {
		stats, err := decodeStats([]byte(test.answer))
		if err != nil {
			t.Errorf("%s: %v", test.why, err)
			continue
		}
		if got := asLines(flattened(stats, origin{}, details{})); got != test.want {
			t.Errorf("%s: got\n%swant\n%s", test.why, got, test.want)
		}
	}

	// Windows counts CPU time in 100 ns, and its system_cpu_usage not at all.
	stats, err := decodeStats([]byte(`{` + at + `"cpu_stats":{"cpu_usage":{"total_usage":3,"usage_in_kernelmode":2}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := asLines(flattened(stats, origin{windows: true}, details{})), "c.cpu.total 300 1795409680\nc.cpu.kernel 200 1795409680\n"; got != want {
		t.Errorf("Windows: got\n%swant\n%s", got, want)
	}
}

func TestCPUPercent(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(1795409680+int64(s), 0) }
	started := at(-100)
	const second = 1_000_000_000
	before := &cpuSample{startedAt: started, read: at(0), total: 10 * second, system: 1000 * second, cpus: 2}
	for _, test := range []struct {
		why  string
		now  *cpuSample
		from origin
		want string // "" for none
	}{
		{"half a CPU of two", &cpuSample{started, at(60), 40 * second, 1120 * second, 2}, origin{}, "50"},
		{"two full CPUs", &cpuSample{started, at(60), 130 * second, 1120 * second, 2}, origin{}, "200"},
		{"idle", &cpuSample{started, at(60), 10 * second, 1120 * second, 2}, origin{}, "0"},
		{"nothing told", nil, origin{}, ""},
		{"the counter fell", &cpuSample{started, at(60), 9 * second, 1120 * second, 2}, origin{}, ""},
		{"started anew", &cpuSample{at(30), at(60), 40 * second, 1120 * second, 2}, origin{}, ""},
		{"the system's clock stood still", &cpuSample{started, at(60), 40 * second, 1000 * second, 2}, origin{}, ""},
		{"the system's clock fell", &cpuSample{started, at(60), 40 * second, 10 * second, 2}, origin{}, ""},
		{"the same answer again", &cpuSample{started, at(0), 40 * second, 1120 * second, 2}, origin{}, ""},
		{"the engine's clock was put back", &cpuSample{started, at(-60), 40 * second, 1120 * second, 2}, origin{}, ""},
		// Podman's system counts used time only.
		{"Podman", &cpuSample{started, at(60), 40 * second, 1031 * second, 2}, origin{podman: true}, "50"},
		// 100 ns, of which two processors have 1,200,000,000 a minute.
		{"Windows", &cpuSample{started, at(60), 10*second + 300_000_000, 0, 2}, origin{windows: true}, "25"},
		{"Windows that does not tell its processors", &cpuSample{started, at(60), 11 * second, 0, 0}, origin{windows: true}, ""},
	} {
		got := ""
		if percent, ok := test.now.percentSince(before, test.from); ok {
			if v, ok := decimal(percent); ok {
				got = string(v.append(nil))
			}
		}
		if got != test.want {
			t.Errorf("%s: %q, want %q", test.why, got, test.want)
		}
	}
	if _, ok := before.percentSince(nil, origin{}); ok {
		t.Error("there is a percentage of a first sample")
	}
}

// FuzzStats: whatever an engine answers, what goes out are metrics as the contract has them.
func FuzzStats(f *testing.F) {
	answers, err := filepath.Glob("testdata/engine/*/stats-*.json")
	if err != nil || len(answers) < 20 {
		f.Fatalf("recorded answers: %q %v", answers, err)
	}
	for _, file := range answers {
		body, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body, strings.Contains(file, "windows"), strings.Contains(file, "podman"))
	}
	f.Fuzz(func(t *testing.T, body []byte, windows, podman bool) {
		stats, err := decodeStats(body)
		if err != nil {
			if strings.ContainsAny(errorText(err), "\r\n") {
				t.Errorf("an error of more than one line: %v", err)
			}
			return
		}
		from := origin{windows: windows, podman: podman}
		flat := flattener{}
		stats.flatten(&flat, "c", from, details{true, true, true})
		now := stats.cpuSample(time.Time{}, from)
		before := &cpuSample{read: stats.Read.Add(-time.Minute)}
		if percent, ok := now.percentSince(before, from); ok {
			flat.addDecimal(".cpu.percent", percent)
		}
		for _, m := range flat.metrics {
			if !goodName.MatchString(m.name()) || badEnd.MatchString(m.name()) {
				t.Errorf("the name %q", m.name())
			}
			if v := m.value.append(nil); !goodValue.Match(v) {
				t.Errorf("the value %s of %s", v, m.name())
			}
			if m.time < 0 {
				t.Errorf("the time %d of %s", m.time, m.name())
			}
		}
		if body := encode(flat.metrics); !json.Valid(body) {
			t.Errorf("the body %s", body)
		}
	})
}
