package main

import (
	"encoding/json"
	"flag"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
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
			got = asLines(flattened(stats, origin{windows: strings.Contains(file, "windows")},
				details{true, true, true}))
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
		{"nulls", `{` + at + `"networks":null,"memory_stats":{"usage":null,"stats":null},` +
			`"cpu_stats":null}`, ""},
		{"no interfaces", `{` + at + `"networks":{}}`, ""},
		{"a zero that was sent", `{` + at + `"cpu_stats":{"cpu_usage":{"total_usage":0}}}`,
			"c.cpu.total 0 1795409680\n"},
		{"all digits", `{` + at + `"memory_stats":{"limit":18446744073709551615}}`,
			"c.memory.limit 18446744073709551615 1795409680\n"},
		{"cgroup v1: the children count",
			`{` + at + `"memory_stats":{"usage":10,"stats":{"total_cache":4,"cache":1,"file":2,` +
				`"total_inactive_file":3,"inactive_file":1}}}`,
			"c.memory.usage 10 1795409680\nc.memory.cache 4 1795409680\nc.memory.active 6 " +
				"1795409680\nc.memory.working_set 7 1795409680\n"},
		{"cgroup v1 of old", `{` + at + `"memory_stats":{"usage":10,"stats":{"cache":1,"rss":2,` +
			`"swap":3}}}`,
			"c.memory.usage 10 1795409680\nc.memory.cache 1 1795409680\nc.memory.active 9 " +
				"1795409680\nc.memory.working_set 10 1795409680\nc.memory.rss 2 1795409680\nc.memory.swap 3 " +
				"1795409680\n"},
		{"more cache than usage",
			`{` + at + `"memory_stats":{"usage":10,"limit":30,"stats":{"file":11,"inactive_file":11}}}`,
			"c.memory.usage 10 1795409680\nc.memory.limit 30 1795409680\nc.memory.cache 11 " +
				"1795409680\nc.memory.active 0 1795409680\nc.memory.working_set 10 " +
				"1795409680\nc.memory.percent 33.333 1795409680\n"},
		{"cache without usage", `{` + at + `"memory_stats":{"stats":{"file":11}}}`,
			"c.memory.cache 11 1795409680\n"},
		{"no limit, no percentage", `{` + at + `"memory_stats":{"usage":1,"limit":0}}`,
			"c.memory.usage 1 1795409680\nc.memory.limit 0 1795409680\nc.memory.working_set 1 1795409680\n"},
		{"unlimited pids, cgroup v1", `{` + at + `"pids_stats":{"current":3,"limit":0}}`,
			"c.pids.current 3 1795409680\n"},
		{"unlimited pids, cgroup v2",
			`{` + at +
				`"pids_stats":{"current":3,"limit":18446744073709551615}}`, "c.pids.current 3 1795409680\n"},
		{"CPUs that are not told",
			`{` + at + `"cpu_stats":{"online_cpus":0,"cpu_usage":{"percpu_usage":[]}}}`, ""},
		{"CPUs that are counted", `{` + at + `"cpu_stats":{"cpu_usage":{"percpu_usage":[1,2,0]}}}`,
			"c.cpu.online 3 1795409680\n"},
		{"no device did anything",
			`{` + at + `"blkio_stats":{"io_service_bytes_recursive":[],"io_serviced_recursive":null}}`,
			"c.blkio.read_bytes 0 1795409680\nc.blkio.write_bytes 0 1795409680\n"},
		{"reads and writes of all devices",
			`{` + at + `"blkio_stats":{"io_service_bytes_recursive":[{"major":8,"op":"Read","value":1},` +
				`{"major":9,"op":"read","value":2},` +
				`{"major":8,"op":"WRITE","value":4},{"major":8,"op":"Sync","value":8},{"major":8,` +
				`"op":"Async","value":16},{"major":8,"op":"Discard","value":32},{"major":8,"op":"Total",` +
				`"value":64}]}}`,
			"c.blkio.read_bytes 3 1795409680\nc.blkio.write_bytes 4 1795409680\n"},
		{"before API 1.21", `{` + at + `"network":{"rx_bytes":1,"tx_errors":0}}`,
			"c.network.rx_bytes 1 1795409680\nc.network.tx_errors 0 1795409680\n"},
		{"sums over interfaces",
			`{` + at + `"networks":{"eth0":{"rx_bytes":1,"tx_bytes":5},"eth1":{"rx_bytes":2}}}`,
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
	stats, err := decodeStats([]byte(`{` + at + `"cpu_stats":{"cpu_usage":{"total_usage":3,` +
		`"usage_in_kernelmode":2}}}`))
	if err != nil {
		t.Fatal(err)
	}
	got := asLines(flattened(stats, origin{windows: true}, details{}))
	if want := "c.cpu.total 300 1795409680\nc.cpu.kernel 200 1795409680\n"; got != want {
		t.Errorf("Windows: got\n%swant\n%s", got, want)
	}
}

func TestCPUPercent(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(1795409680+int64(s), 0) }
	started := at(-100)
	const second = 1_000_000_000
	before := &cpuSample{startedAt: started, read: at(0), total: 10 * second, system: 1000 * second,
		cpus: 2}
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
		{"the system's clock stood still", &cpuSample{started, at(60), 40 * second, 1000 * second, 2},
			origin{}, ""},
		{"the system's clock fell", &cpuSample{started, at(60), 40 * second, 10 * second, 2}, origin{},
			""},
		{"the same answer again", &cpuSample{started, at(0), 40 * second, 1120 * second, 2}, origin{},
			""},
		{"the engine's clock was put back", &cpuSample{started, at(-60), 40 * second, 1120 * second, 2},
			origin{}, ""},
		// Podman's system counts used time only.
		{"Podman", &cpuSample{started, at(60), 40 * second, 1031 * second, 2}, origin{podman: true},
			"50"},
		// 100 ns, of which two processors have 1,200,000,000 a minute.
		{"Windows", &cpuSample{started, at(60), 10*second + 300_000_000, 0, 2}, origin{windows: true},
			"25"},
		{"Windows that does not tell its processors", &cpuSample{started, at(60), 11 * second, 0, 0},
			origin{windows: true}, ""},
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
			if !harness.IsGoodName(m.name()) {
				t.Errorf("the name %q", m.name())
			}
			if v := m.value.append(nil); !harness.IsGoodValue(string(v)) {
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

// everyMetric returns the names of all metrics that the code can make.
func everyMetric(t *testing.T) []string {
	// An answer that has everything, of all kinds of engines at once
	var s stats
	fill(reflect.ValueOf(&s).Elem())
	metrics := flattened(&s, origin{}, details{true, true, true})

	// Two sweeps, for what needs a sample before, and for the host
	r := harness.NewReplay(t, "cgroup2")
	c, _ := collecting(t, r.URL, 10*time.Second)
	c.host, c.containers.rules = "h", mustRules(t, `{"regexp":"^fx-busy$","into":"c","category":"any"}`)
	r.On("/containers/fx-busy/stats", r.Serve("stats-busy.json"))
	c.sweep(t.Context())
	r.On("/containers/fx-busy/stats", nil)
	metrics = append(metrics, c.sweep(t.Context()).metrics...)
	metrics = append(metrics, newQueue(minSpool, c.log).own("h", time.Now())...)

	var names []string
	for _, m := range metrics {
		if name, ok := strings.CutPrefix(m.name(), "h."); ok {
			names = append(names, strings.Replace("<h>."+name, "containers.any", "containers.<category>", 1))
		} else if name, ok := strings.CutPrefix(m.name(), "c."); ok {
			names = append(names, strings.NewReplacer(".core.0", ".core.<i>", ".if0.", ".<if>.", ".1_1.",
				".<major>_<minor>.").Replace("<c>."+name))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// fill sets everything in v to 1, or to one of its kind.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(1795409680, 0)))
			return
		}
		if v.Type() == reflect.TypeFor[count]() {
			v.Set(reflect.ValueOf(counted(1)))
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		entry := reflect.New(v.Type().Elem()).Elem()
		fill(entry)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf("if0"), entry)
	case reflect.Uint64:
		v.SetUint(1)
	}
}

func TestMetricsAreDocumented(t *testing.T) {
	var documented []string
	for _, name := range harness.AllOf("(?m)^\\| `(<[ch]>[^`]+)`",
		harness.ReadFile(t, "docs/metrics.md")) {
		documented = append(documented, harness.Expand(name)...)
	}
	slices.Sort(documented)
	sent := everyMetric(t)
	for _, name := range sent {
		if !slices.Contains(documented, name) {
			t.Errorf("docs/metrics.md lacks %s", name)
		}
	}
	for _, name := range documented {
		if !slices.Contains(sent, name) {
			t.Errorf("docs/metrics.md has %s, which nothing sends", name)
		}
	}
	// What other documents show of them has to be among them.
	for _, name := range harness.AllOf("`(<[ch]>[^`*]+)`", harness.Documentation(t)) {
		for _, name := range harness.Expand(name) {
			if !slices.Contains(sent, name) {
				t.Errorf("a document has %s, which nothing sends", name)
			}
		}
	}
}

// oneContainer returns what is done for one container in each sweep, step by step.
func oneContainer(t testing.TB) (decode, flatten, name, encoding func()) {
	body, err := os.ReadFile("testdata/engine/cgroup1/stats-one-shot-busy.json")
	if err != nil {
		t.Fatal(err)
	}
	s, err := decodeStats(body)
	if err != nil {
		t.Fatal(err)
	}
	var f flattener
	rs := mustRules(t, `{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}`)
	who := subject{name: "my.container.name.x"}
	decode = func() { decodeStats(body) }
	flatten = func() {
		f.metrics = f.metrics[:0]
		s.flatten(&f, "my.name", origin{}, details{})
	}
	flatten()
	name = func() { rs.apply(who, "h") }
	encoding = func() { encode(f.metrics) }
	return decode, flatten, name, encoding
}

// Names are made once in a container's life, and are not among the costs of a sweep.
func TestAllocationsOfAContainer(t *testing.T) {
	decode, flatten, _, encoding := oneContainer(t)
	if n := testing.AllocsPerRun(100, func() { decode(); flatten(); encoding() }); n > 40 {
		t.Errorf("%v allocations", n)
	}
	if n := testing.AllocsPerRun(100, flatten); n > 0 {
		t.Errorf("%v allocations to flatten", n)
	}
}

func BenchmarkContainer(b *testing.B) {
	decode, flatten, name, encoding := oneContainer(b)
	for _, step := range []struct {
		name string
		do   func()
	}{{"decode", decode}, {"flatten", flatten}, {"name", name}, {"encode", encoding}} {
		b.Run(step.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				step.do()
			}
		})
	}
}

func TestMetricOnTheWire(t *testing.T) {
	m := metric{"web", ".cpu.total", whole(math.MaxUint64), 1795409680}
	got := string(m.appendLine(nil))
	if want := "web.cpu.total 18446744073709551615 1795409680\n"; got != want {
		t.Errorf("plaintext: %q, want %q", got, want)
	}
	p, _ := decimal(12.5)
	body := encode([]metric{m, {"web.cpu", ".percent", p, 1795409681}})
	if want := `[{"metric":"web.cpu.total","value":18446744073709551615,"measure_time":1795409680},` +
		`{"metric":"web.cpu.percent","value":12.5,"measure_time":1795409681}]`; string(body) != want ||
		!json.Valid(body) {
		t.Errorf("JSON: %s, want %s", body, want)
	}
	if got := string(encode(nil)); got != "[]" {
		t.Errorf("JSON of nothing: %s", got)
	}
}

func TestDecimals(t *testing.T) {
	for f, want := range map[float64]string{
		0: "0", 1: "1", 0.0004: "0", 0.0005: "0.001", 0.001: "0.001", 0.01: "0.01", 0.1: "0.1",
		29.9199: "29.92",
		99.9996: "100", 1234567.8901: "1234567.89", 1e12: "1000000000000",
	} {
		v, ok := decimal(f)
		if got := string(v.append(nil)); !ok || got != want {
			t.Errorf("%v: %s %t, want %s", f, got, ok, want)
		}
	}
	for _, f := range []float64{-1, math.NaN(), math.Inf(1), math.Inf(-1), 1e300} {
		if v, ok := decimal(f); ok {
			t.Errorf("%v was taken as %s", f, v.append(nil))
		}
	}
}

func TestDecodeUndoesEncode(t *testing.T) {
	p, _ := decimal(12.5)
	q, _ := decimal(0.001)
	metrics := []metric{
		{"web", ".cpu.total", whole(math.MaxUint64), 1795409680}, {"web", ".cpu.percent", p,
			1795409681}, {"", "a.b", q, 1}, {"", "a", whole(0), 9_999_999_999},
	}
	got, err := decode(encode(metrics))
	if err != nil || asLines(got) != asLines(metrics) {
		t.Errorf("%s %v, want %s", asLines(got), err, asLines(metrics))
	}
	for body, want := range map[string]string{
		``:      "not metrics in JSON: ",
		`[] []`: "not metrics in JSON: ",
		`[1]`:   "not metrics in JSON: ",
		`[{"metric":"a","value":1,"measure_time":1.5}]`: "not metrics in JSON: ",
		`[{"metric":"a","value":1,"measure_time":1},{}]`: `item 2 is no metric: "" = ` +
			`"" at 0`,
		`[{"metric":"a b","value":1,"measure_time":1}]`: `item 1 is no metric: "a b" ` +
			`= "1" at 1`,
		`[{"metric":"a\nb.c 1 1","value":1,"measure_time":1}]`: `item 1 is no metric: ` +
			`"a\nb.c 1 1" = "1" at 1`,
		`[{"metric":"a..b","value":1,"measure_time":1}]`:                 `item 1 is no metric`,
		`[{"metric":"a","value":-1,"measure_time":1}]`:                   `item 1 is no metric`,
		`[{"metric":"a","value":1e9,"measure_time":1}]`:                  `item 1 is no metric`,
		`[{"metric":"a","value":1.2345,"measure_time":1}]`:               `item 1 is no metric`,
		`[{"metric":"a","value":1,"measure_time":0}]`:                    `item 1 is no metric`,
		`[{"metric":"a","value":null,"measure_time":1}]`:                 `item 1 is no metric`,
		`[{"metric":"a","value":99999999999999999999,"measure_time":1}]`: `item 1 is no metric`,
	} {
		if got, err := decode([]byte(body)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, error %v", body, got, err)
		}
	}
}

func TestLastOf(t *testing.T) {
	metrics := []metric{{"", "a.b", whole(1), 1}, {"", "a.c", whole(2), 2}}
	for n := range 3 {
		got := string(lastOf(encode(metrics[:n])))
		if want := string(encode(metrics[max(n-1, 0):n])); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
