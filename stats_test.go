package main

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

var update = flag.Bool("update", false, "write the golden files anew")

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
			from := origin{windows: strings.Contains(file, "windows"),
				podman: strings.Contains(file, "podman")}
			got = asLines(flattened(stats, from, details{true, true, true}))
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
		{"all digits", `{` + at + `"memory_stats":{"limit":9223372036854775807}}`,
			"c.memory.limit 9223372036854775807 1795409680\n"},
		{"cgroup v1: the children count",
			`{` + at + `"memory_stats":{"usage":10,"stats":{"total_cache":4,"cache":1,"file":2,` +
				`"total_inactive_file":3,"inactive_file":1}}}`,
			"c.memory.usage 10 1795409680\nc.memory.cache 4 1795409680\nc.memory.active 6 " +
				"1795409680\nc.memory.working_set 7 1795409680\nc.memory.failcnt 0 1795409680\n"},
		{"cgroup v1 of old", `{` + at + `"memory_stats":{"usage":10,"stats":{"cache":1,"rss":2,` +
			`"swap":3}}}`,
			"c.memory.usage 10 1795409680\nc.memory.cache 1 1795409680\nc.memory.active 9 " +
				"1795409680\nc.memory.working_set 10 1795409680\nc.memory.rss 2 1795409680\nc.memory.swap 3 " +
				"1795409680\nc.memory.failcnt 0 1795409680\n"},
		{"more cache than usage",
			`{` + at + `"memory_stats":{"usage":10,"limit":30,"stats":{"file":11,"inactive_file":11}}}`,
			"c.memory.usage 10 1795409680\nc.memory.limit 30 1795409680\nc.memory.cache 11 " +
				"1795409680\nc.memory.active 0 1795409680\nc.memory.working_set 10 " +
				"1795409680\nc.memory.percent 33.333 1795409680\nc.memory.failcnt 0 1795409680\n"},
		{"cache without usage", `{` + at + `"memory_stats":{"stats":{"file":11}}}`,
			"c.memory.cache 11 1795409680\n"},
		{"no limit, no percentage", `{` + at + `"memory_stats":{"usage":1,"limit":0}}`,
			"c.memory.usage 1 1795409680\nc.memory.limit 0 1795409680\n" +
				"c.memory.working_set 1 1795409680\nc.memory.failcnt 0 1795409680\n"},
		{"unlimited pids, cgroup v1", `{` + at + `"pids_stats":{"current":3,"limit":0}}`,
			"c.pids.current 3 1795409680\n"},
		{"unlimited pids, cgroup v2",
			`{` + at +
				`"pids_stats":{"current":3,"limit":18446744073709551615}}`, "c.pids.current 3 1795409680\n"},
		{"CPUs that are not told",
			`{` + at + `"cpu_stats":{"online_cpus":0,"cpu_usage":{"percpu_usage":[]}}}`, ""},
		{"CPUs that are possible", `{` + at + `"cpu_stats":{"cpu_usage":{"percpu_usage":[1,2,0]}}}`, ""},
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
	if got, want := asLines(flattened(stats, origin{windows: true},
		details{})), "c.cpu.total 300 1795409680\nc.cpu.kernel 200 1795409680\n"+
		"c.blkio.read_bytes 0 1795409680\nc.blkio.write_bytes 0 1795409680\n"+
		"c.blkio.read_ops 0 1795409680\nc.blkio.write_ops 0 1795409680\n"; got != want {
		t.Errorf("Windows: got\n%swant\n%s", got, want)
	}
}

func TestCPUPercent(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(1795409680+int64(s), 0) }
	const second = 1_000_000_000
	sample := func(start, read int, total uint64) *cpuSample {
		return &cpuSample{at(start), at(read), total, 1}
	}
	before := sample(-100, 0, 10*second)
	for _, test := range []struct {
		why    string
		sample *cpuSample
		want   string // "" for none
	}{
		{"half a CPU", sample(-100, 60, 40*second), "50"},
		{"two full CPUs", sample(-100, 60, 130*second), "200"},
		{"idle", sample(-100, 60, 10*second), "0"},
		{"nothing told", nil, ""},
		{"the counter fell", sample(-100, 60, 9*second), ""},
		{"started anew", sample(30, 60, 40*second), ""},
		{"the same answer again", sample(-100, 0, 40*second), ""},
		{"the engine's clock was put back", sample(-100, -60, 40*second), ""},
		{"Windows, in ticks of 100 ns", &cpuSample{at(-100), at(60), 10*second + 300_000_000, 100}, "50"},
	} {
		got := ""
		if percent, ok := test.sample.percentSince(before); ok {
			if v, ok := decimal(percent); ok {
				got = string(v.append(nil))
			}
		}
		if got != test.want {
			t.Errorf("%s: %q, want %q", test.why, got, test.want)
		}
	}
	if _, ok := sample(-100, 60, 40*second).percentSince(nil); ok {
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
		f.Add(body, strings.Contains(file, "windows"), strings.Contains(file, "podman"),
			uint64(4), uint64(8<<30))
	}
	f.Fuzz(func(t *testing.T, body []byte, windows, podman bool, cpus, memory uint64) {
		stats, err := decodeStats(body)
		if err != nil {
			if strings.ContainsAny(errorText(err), "\r\n") {
				t.Errorf("an error of more than one line: %v", err)
			}
			return
		}
		from := origin{windows, podman, cpus >> 1, memory >> 1}
		flat := flattener{path: "c", at: 1795409680}
		stats.flatten(&flat, from, details{true, true, true})
		sample := stats.cpuSample(time.Time{}, from)
		before := &cpuSample{read: stats.Read.Add(-time.Minute)}
		if percent, ok := sample.percentSince(before); ok {
			flat.addDecimal(".cpu.percent", percent)
		}
		seen := map[string]bool{}
		for _, m := range flat.metrics {
			if seen[m.name()] {
				t.Errorf("%s twice", m.name())
			}
			seen[m.name()] = true
			if !m.value.thousandth && m.value.n >= 1<<63 {
				t.Errorf("%s is %d", m.name(), m.value.n)
			}
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
	f := flattener{path: "my.name"}
	rs := mustRules(t, `{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}`)
	who := subject{name: "my.container.name.x"}
	decode = func() { decodeStats(body) }
	flatten = func() {
		f.metrics = f.metrics[:0]
		s.flatten(&f, origin{}, details{})
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

// What engines send that is no count, and what Docker cannot send.

// valuesOf returns the metrics of a stats answer with what is given beside its time, as "name
// value" without the container, sorted.
func valuesOf(t *testing.T, answer string, from origin, per details) []string {
	t.Helper()
	s, err := decodeStats([]byte(`{"read":"2026-11-23T04:54:40.9Z",` + answer + `}`))
	if err != nil {
		t.Errorf("%s: %v", answer, err)
		return nil
	}
	var values []string
	for _, m := range flattened(s, from, per) {
		values = append(values, strings.TrimPrefix(m.name(), "c.")+" "+string(m.value.append(nil)))
	}
	slices.Sort(values)
	return values
}

func TestNumbersThatAreNone(t *testing.T) {
	host := origin{cpus: 2, memory: 8000}
	for _, test := range []struct {
		why, answer string
		from        origin
		want        string
	}{
		// podman#16007
		{"no limit", `"memory_stats":{"usage":400,"limit":18446744073709551615,` +
			`"max_usage":18446744073709551615}`, host,
			"cpu.online 2, memory.failcnt 0, memory.limit 8000, memory.percent 5, memory.usage 400, " +
				"memory.working_set 400"},
		{"no limit on cgroup v1", `"memory_stats":{"limit":9223372036854771712}`, host,
			"cpu.online 2, memory.limit 8000"},
		{"a limit above the host's memory", `"memory_stats":{"usage":400,"limit":8001}`, host,
			"cpu.online 2, memory.failcnt 0, memory.limit 8000, memory.percent 5, memory.usage 400, " +
				"memory.working_set 400"},
		{"a limit of its own", `"memory_stats":{"limit":7999}`, host,
			"cpu.online 2, memory.limit 7999"},
		{"a limit that is none", `"memory_stats":{"limit":-1}`, host, "cpu.online 2"},
		{"no limit, and an unknown host", `"memory_stats":{"usage":4,"limit":9223372036854775808}`,
			origin{}, "memory.failcnt 0, memory.usage 4, memory.working_set 4"},
		{"unlimited pids", `"pids_stats":{"current":3,"limit":18446744073709551615}`, origin{},
			"pids.current 3"},
		{"a limit with more digits than that", `"pids_stats":{"limit":100000000000000000000}`, origin{},
			""},
		// moby#42140
		{"an underflow", `"memory_stats":{"usage":18446744073709547520,"limit":9,"max_usage":8,` +
			`"stats":{"total_cache":4,"total_rss":0,"total_inactive_file":4}}`, origin{},
			"memory.cache 4, memory.failcnt 0, memory.limit 9, memory.max_usage 8, memory.rss 0"},
		{"a broken part of a difference", `"memory_stats":{"usage":9,"limit":10,` +
			`"stats":{"total_inactive_file":-4,"inactive_file":1,"total_cache":1.5,"cache":1}}`, origin{},
			"memory.failcnt 0, memory.limit 10, memory.usage 9"},
		{"a broken part of a sum", `"networks":{"a":{"rx_bytes":1,"tx_bytes":2},` +
			`"b":{"rx_bytes":-1,"tx_bytes":3},"c":{"tx_bytes":4}}`, origin{}, "network.tx_bytes 9"},
		{"a sum that is too large", `"networks":{"a":{"rx_bytes":9223372036854775807},` +
			`"b":{"rx_bytes":1,"tx_bytes":3}}`, origin{}, "network.tx_bytes 3"},
		{"a broken entry of a device", `"blkio_stats":{"io_service_bytes_recursive":[` +
			`{"op":"read","value":-1},{"op":"read","value":4},{"op":"write","value":2}]}`, origin{},
			"blkio.write_bytes 2"},
		{"ticks that are too many", `"cpu_stats":{"cpu_usage":{"total_usage":92233720368547758080,` +
			`"usage_in_usermode":922337203685477581,"usage_in_kernelmode":1}},"storage_stats":` +
			`{"read_size_bytes":-1,"write_size_bytes":1,"read_count_normalized":1,` +
			`"write_count_normalized":1}`, origin{windows: true},
			"blkio.read_ops 1, blkio.write_bytes 1, blkio.write_ops 1, cpu.kernel 100"},
		{"CPUs", `"cpu_stats":{"online_cpus":-2,"system_cpu_usage":"much"}`, host, "cpu.online 2"},
	} {
		if got := strings.Join(valuesOf(t, test.answer, test.from, details{}), ", "); got != test.want {
			t.Errorf("%s: got\n%s, want\n%s", test.why, got, test.want)
		}
	}
}

// eachValue calls do for each value within a JSON value, while something else stands in its place.
func eachValue(within, other any, path string, do func(path string, old any)) {
	in := func(name string, old any, set func(any)) {
		set(other)
		do(path+"/"+name, old)
		set(old)
		eachValue(old, other, path+"/"+name, do)
	}
	switch within := within.(type) {
	case map[string]any:
		for name, old := range within {
			in(name, old, func(v any) { within[name] = v })
		}
	case []any:
		for i, old := range within {
			in(strconv.Itoa(i), old, func(v any) { within[i] = v })
		}
	}
}

// Whatever stands in the place of a value, the answer is read. A number that is none costs what is
// made of it, and changes nothing else.
func TestOneBrokenValueCostsItself(t *testing.T) {
	for _, engine := range []string{"cgroup1/stats-two", "cgroup2/stats-two", "windows/stats-web"} {
		var answer map[string]any
		decoder := json.NewDecoder(strings.NewReader(
			harness.ReadFile(t, "testdata/engine/"+engine+".json")))
		decoder.UseNumber()
		harness.Must(t, decoder.Decode(&answer))
		flat := func() ([]metric, error) {
			body, err := json.Marshal(answer)
			harness.Must(t, err)
			s, err := decodeStats(body)
			if err != nil {
				return nil, err
			}
			from := origin{windows: strings.HasPrefix(engine, "windows"), cpus: 2}
			return flattened(s, from, details{true, true, true}), nil
		}
		all, err := flat()
		harness.Must(t, err)
		for _, other := range []any{json.Number("-1"), json.Number("1.5"),
			json.Number("18446744073709551615"), "", "x", true, nil,
			[]any{}, []any{"x"}, map[string]any{}, map[string]any{"x": []any{}}} {
			eachValue(answer, other, "", func(path string, old any) {
				got, err := flat()
				if (err == nil) == (path == "/read") {
					t.Errorf("%s: %v in %s: error %v", engine, other, path, err)
				}
				_, wasNumber := old.(json.Number)
				if _, isNumber := other.(json.Number); !wasNumber || !isNumber {
					return
				}
				if len(got) < len(all)-4 { // usage, active, working_set and percent
					t.Errorf("%s: %v in %s costs %d metrics", engine, other, path, len(all)-len(got))
				}
				for _, m := range got {
					if !slices.Contains(all, m) {
						t.Errorf("%s: %v in %s makes %s", engine, other, path, m.appendLine(nil))
					}
				}
			})
		}
	}
}

func TestCPUs(t *testing.T) {
	const cores = `"cpu_stats":{"cpu_usage":{"percpu_usage":[7,0,0,5]}`
	for _, test := range []struct {
		why, answer string
		from        origin
		want        string
	}{
		{"as the answer tells", cores + `,"online_cpus":2}`, origin{cpus: 8},
			"cpu.core.0 7, cpu.core.1 0, cpu.core.3 5, cpu.online 2"},
		{"as /info tells", cores + `}`, origin{cpus: 1}, "cpu.core.0 7, cpu.core.3 5, cpu.online 1"},
		{"as nobody tells", cores + `,"online_cpus":0}`, origin{}, "cpu.core.0 7, cpu.core.3 5"},
		{"a broken one", `"cpu_stats":{"online_cpus":3,"cpu_usage":{"percpu_usage":[7,-1,6]}}`,
			origin{}, "cpu.core.0 7, cpu.core.2 6, cpu.online 3"},
	} {
		got := strings.Join(valuesOf(t, test.answer, test.from, details{core: true}), ", ")
		if got != test.want {
			t.Errorf("%s: got %s, want %s", test.why, got, test.want)
		}
	}
}

// Docker leaves out what is 0.
func TestZerosThatDockerCannotSend(t *testing.T) {
	const windows = `"os_type":"windows","storage_stats":{"write_size_bytes":5},"cpu_stats":` +
		`{"cpu_usage":{"total_usage":3}},"memory_stats":{"commitbytes":1}`
	for _, test := range []struct {
		why, answer string
		from        origin
		want        string
	}{
		{"Docker", `"memory_stats":{"usage":1}`, origin{},
			"memory.failcnt 0, memory.usage 1, memory.working_set 1"},
		{"Docker after an OOM kill", `"memory_stats":{"usage":1,"failcnt":1}`, origin{},
			"memory.failcnt 1, memory.usage 1, memory.working_set 1"},
		{"Docker that does not tell of memory", `"memory_stats":{}`, origin{}, ""},
		{"Podman", `"memory_stats":{"usage":1}`, origin{podman: true},
			"memory.usage 1, memory.working_set 1"},
		{"Windows by its body", windows, origin{},
			"blkio.read_bytes 0, blkio.read_ops 0, blkio.write_bytes 5, blkio.write_ops 0, " +
				"cpu.total 300, memory.commit 1"},
		{"Windows by its header", `"storage_stats":{"read_size_bytes":1}`, origin{windows: true},
			"blkio.read_bytes 1, blkio.read_ops 0, blkio.write_bytes 0, blkio.write_ops 0"},
		{"Linux by its body", `"os_type":"linux","storage_stats":{}`, origin{}, ""},
		{"no name of a system", `"os_type":7,"storage_stats":{}`, origin{}, ""},
	} {
		if got := strings.Join(valuesOf(t, test.answer, test.from, details{}), ", "); got != test.want {
			t.Errorf("%s: got %s, want %s", test.why, got, test.want)
		}
	}

	s, err := decodeStats([]byte(`{"read":"2026-11-23T04:54:40Z","os_type":"windows",` +
		`"cpu_stats":{"cpu_usage":{"total_usage":300000000}}}`))
	harness.Must(t, err)
	sample := s.cpuSample(time.Time{}, origin{})
	before := &cpuSample{read: s.Read.Add(-time.Minute)}
	if percent, ok := sample.percentSince(before); !ok || percent != 50 {
		t.Errorf("Windows by its body: %v%%, %t", percent, ok)
	}
}

func TestInterfacesAreToldApart(t *testing.T) {
	for _, test := range []struct{ names, want []string }{
		{[]string{"eth0", "eth1"}, []string{"eth0 1", "eth1 2"}},
		{[]string{"eth0.1", "eth1"}, []string{"eth0_1 1", "eth1 2"}},
		{[]string{"eth0.1", "eth0_1"}, []string{"eth0_1 1"}}, // one of those that cannot be told apart
		{[]string{""}, nil},
	} {
		networks := map[string]any{}
		for i, name := range test.names {
			networks[name] = map[string]any{"rx_bytes": i + 1}
		}
		body, err := json.Marshal(networks)
		harness.Must(t, err)
		var got []string
		for _, value := range valuesOf(t, `"networks":`+string(body), origin{}, details{iface: true}) {
			value = strings.TrimPrefix(value, "network.")
			if node, n, of := strings.Cut(value, ".rx_bytes"); of {
				got = append(got, node+n)
			}
		}
		slices.Sort(got)
		slices.Sort(test.want)
		if !slices.Equal(got, test.want) {
			t.Errorf("%q became %q, want %q", test.names, got, test.want)
		}
	}
}

// A thousand times the devices may take some thousand times as long, not a million times.
func TestManyDevicesTakeLinearTime(t *testing.T) {
	flatten := func(devices int) (f flattener, took time.Duration) {
		s := stats{Read: new(time.Unix(1795409680, 0))}
		for i := range devices {
			for _, op := range []string{"Read", "Write", "Sync", "Async", "Total"} {
				s.Blkio.Bytes = append(s.Blkio.Bytes,
					blkioEntry{counted(8), counted(uint64(i)), op, counted(1)})
			}
		}
		start := time.Now()
		s.flatten(&f, origin{}, details{device: true})
		return f, time.Since(start)
	}
	f, took := flatten(15_000)
	if len(f.metrics) != 2+2*15_000 || took > time.Second {
		t.Errorf("%d metrics of 15,000 devices in %s", len(f.metrics), took)
	}
}

// A whole number is one however it is written, in stats, inspect and /info alike.
func TestWholeNumbers(t *testing.T) {
	for text, want := range map[string]string{
		"67108864": "67108864", "6.7108864e+07": "67108864", "6.7108864E7": "67108864",
		"1e3": "1000", "1.5e1": "15", "0e5": "0", "0.0": "0", "12.0": "12", "100e-2": "1",
		"18014398509481984": "18014398509481984", "9007199254740993": "9007199254740993",
		"1.55e1": "", "0.5": "", "-1e3": "", "1e19": "", "1e400": "", `"1e3"`: "", `"7"`: "", "true": "",
		"[7]": "", "null": "", "{}": "",
	} {
		s, c, _ := newSmall(t, `[{"Id":"1","Names":["/web"]}]`)
		s.container("1", strings.Replace(smallInspect, "3", text, 1), `{"read":"2026-01-01T00:01:00Z",`+
			`"pids_stats":{"current":`+text+`},"memory_stats":{"usage":`+text+`}}`)
		s.answers["/info"] = `{"Name":"h","NCPU":` + text + `}`
		lines := []string{"web.pids.current " + want, "web.memory.usage " + want, "web.restarts " + want}
		if want != "0" {
			lines = append(lines, "web.cpu.online "+want)
		}
		if want == "" {
			lines = []string{"!web.pids.current", "!web.memory.usage", "!web.restarts", "!web.cpu.online"}
		}
		wants(t, text, c.sweep(t.Context()), append(lines, "h.metrics.failed 0", "web.uptime 60")...)
	}
}
