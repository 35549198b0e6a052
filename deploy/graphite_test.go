//go:build linux

package deploy_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// The tests in this file are of what docs/graphite.md has for Carbon, and of other receivers.

const (
	graphitePage    = "docs/graphite.md"
	schemasFile     = "deploy/graphite/storage-schemas.conf"
	aggregationFile = "deploy/graphite/storage-aggregation.conf"
)

// confSection is one of a file of Carbon's.
type confSection struct {
	name    string
	pattern *regexp.Regexp
	values  map[string]string
}

// confSections returns those of a file, in their order.
func confSections(t *testing.T, text string) []confSection {
	t.Helper()
	var all []confSection
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		name, isSection := strings.CutPrefix(line, "[")
		key, value, isValue := strings.Cut(line, " = ")
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case isSection:
			all = append(all, confSection{strings.TrimSuffix(name, "]"), nil, map[string]string{}})
		case !isValue || len(all) == 0:
			t.Fatalf("%q is not understood", line)
		case key == "pattern":
			var err error
			all[len(all)-1].pattern, err = regexp.Compile(value) // as go-carbon reads it, too
			harness.Must(t, err)
		default:
			all[len(all)-1].values[key] = value
		}
	}
	return all
}

// sectionOf returns the section that counts for a metric: the first that matches.
func sectionOf(sections []confSection, metric string) confSection {
	for _, s := range sections {
		if s.pattern.MatchString(metric) {
			return s
		}
	}
	return confSection{}
}

// others returns what a file has beside our sections.
func others(t *testing.T, text string) string {
	t.Helper()
	_, rest, found := strings.Cut(text, "\n# From here on")
	if !found {
		t.Fatal("where do our sections end?")
	}
	_, rest, _ = strings.Cut(rest, "\n")
	return rest
}

// series returns names of the documented metric as they are in Graphite, behind a prefix.
func series(prefix, metric string) (names []string) {
	for _, container := range []string{"web", "my-shop.web.1", "web1.network.cpu"} {
		names = append(names, prefix+"."+strings.NewReplacer("<c>", container, "<h>", "web1",
			"<category>", "shop", "<i>", "12", "<if>", "eth0", "<major>_<minor>", "254_0").Replace(metric))
	}
	return names
}

// misfits returns the metrics that are not rolled up as suits their kind.
func misfits(sections []confSection, prefix string, metrics map[string]contract) (wrong []string) {
	for metric, is := range metrics {
		want := map[string]string{"counter": "last", "gauge": "average"}[is.kind]
		for _, name := range series(prefix, metric) {
			s := sectionOf(sections, name)
			if s.values["aggregationMethod"] != want || s.values["xFilesFactor"] != "0" {
				wrong = append(wrong, fmt.Sprintf("%s, a %s, by [%s]", name, is.kind, s.name))
			}
		}
	}
	return wrong
}

// Counters keep their last value, gauges their average: each metric of docs/metrics.md, and only
// ours.
func TestGraphiteFilesKnowEveryMetric(t *testing.T) {
	metrics := contracts(t)
	schemas := confSections(t, harness.ReadFile(t, schemasFile))
	aggregation := confSections(t, harness.ReadFile(t, aggregationFile))
	for _, wrong := range misfits(aggregation, "docker", metrics) {
		t.Errorf("%s has %s", aggregationFile, wrong)
	}
	for metric := range metrics {
		for _, name := range series("docker", metric) {
			if s := sectionOf(schemas, name); s.name != "docker" {
				t.Errorf("%s keeps %s by [%s]", schemasFile, name, s.name)
			}
		}
		for _, name := range append(series("collectd.docker", metric), series("dockers", metric)...) {
			for _, sections := range [][]confSection{schemas, aggregation} {
				if s := sectionOf(sections, name); strings.HasPrefix(s.name, "docker") {
					t.Errorf("%s is not ours, and falls under [%s]", name, s.name)
				}
			}
		}
	}

	// A counter that the file does not know is found, and so is a gauge that it takes for one.
	added := maps.Clone(metrics)
	added["<c>.cpu.stolen"] = contract{kind: "counter"}
	added["<c>.cpu.total"] = contract{kind: "gauge"}
	if wrong := misfits(aggregation, "docker", added); len(wrong) != 2*len(series("", "")) {
		t.Errorf("two wrong metrics are found as %q", wrong)
	}
}

// What the page has for another prefix than docker: each of our patterns has it then.
func TestGraphiteFilesForAnotherPrefix(t *testing.T) {
	dir := t.TempDir()
	for _, file := range []string{schemasFile, aggregationFile} {
		harness.Must(t, os.WriteFile(filepath.Join(dir, filepath.Base(file)),
			[]byte(harness.ReadFile(t, file)), 0o600))
	}
	runDocumented(t, "## The two files", "sed -i", map[string]string{"/etc/carbon": dir})
	aggregation := confSections(t, harness.ReadFile(t, dir+"/storage-aggregation.conf"))
	for _, wrong := range misfits(aggregation, "web.prod", contracts(t)) {
		t.Error(wrong)
	}
	schemas := confSections(t, harness.ReadFile(t, dir+"/storage-schemas.conf"))
	if s := sectionOf(schemas, "web.prod.web1.uptime"); s.name != "docker" {
		t.Errorf("its schema is [%s]", s.name)
	}
	if s := sectionOf(schemas, "docker.web1.uptime"); s.name == "docker" {
		t.Error("the old prefix is still there")
	}
}

// runDocumented runs a command of docs/graphite.md, at the top of the repository, with other paths.
func runDocumented(t *testing.T, heading, start string, paths map[string]string) {
	t.Helper()
	script := documented(t, graphitePage, heading, start)
	for from, to := range paths {
		if !strings.Contains(script, from) {
			t.Fatalf("%s is not in\n%s", from, script)
		}
		script = strings.ReplaceAll(script, from, to)
	}
	command := exec.Command("sh", "-ec", script)
	command.Dir = harness.Top(t)
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// Our sections go into files that Carbon has already, or has not.
func TestGraphiteFilesGoBeforeOthers(t *testing.T) {
	dir := t.TempDir()
	const others = "[carbon]\npattern = ^carbon\\.\nretentions = 60:90d\n\n" +
		"[default]\npattern = .*\nretentions = 60s:1d,5m:30d,1h:3y\n"
	harness.Must(t, os.WriteFile(dir+"/storage-schemas.conf", []byte(others), 0o600))
	runDocumented(t, "## The two files", "for file in", map[string]string{"/etc/carbon": dir})
	for file, want := range map[string]string{
		"storage-schemas.conf": "docker, carbon, default",
		"storage-aggregation.conf": "docker_cpu, docker_throttling, docker_memory, docker_network, " +
			"docker_blkio, docker_container, docker_host, docker_gauges",
	} {
		var names []string
		for _, s := range confSections(t, harness.ReadFile(t, filepath.Join(dir, file))) {
			names = append(names, s.name)
		}
		if got := strings.Join(names, ", "); got != want {
			t.Errorf("%s has %s, want %s", file, got, want)
		}
	}
}

// archive is a part of a Whisper file, in seconds.
type archive struct{ step, points int }

func (a archive) retention() int { return a.step * a.points }

// archives reads what Carbon calls retentions.
func archives(t *testing.T, retentions string) (all []archive) {
	t.Helper()
	seconds := func(text string) int {
		unit := map[byte]int{'s': 1, 'm': 60, 'h': 3600, 'd': 86400, 'y': 365 * 86400}[text[len(text)-1]]
		n, err := strconv.Atoi(text[:len(text)-1])
		if err != nil || unit == 0 {
			t.Fatalf("%q is no time", text)
		}
		return n * unit
	}
	for part := range strings.SplitSeq(retentions, ",") {
		step, retention, _ := strings.Cut(part, ":")
		all = append(all, archive{seconds(step), seconds(retention) / seconds(step)})
	}
	return all
}

// fileSize returns how large a Whisper file is:
// https://graphite.readthedocs.io/en/latest/whisper.html#database-format.
func fileSize(all []archive) (bytes int) {
	bytes = 16 + 12*len(all)
	for _, a := range all {
		bytes += 12 * a.points
	}
	return bytes
}

// retentionsFor returns what the shipped file keeps with --poll=60s and --poll=10s, and the whole
// file for each.
func retentionsFor(t *testing.T) (retentions, files map[string]string) {
	t.Helper()
	text := harness.ReadFile(t, schemasFile)
	m := regexp.MustCompile(`(?m)^# With --poll=60s, the default:\n(retentions = (.*))\n` +
		`# With --poll=10s:\n(#(retentions = (.*)))$`).FindStringSubmatch(text)
	if m == nil {
		t.Fatalf("%s is not understood", schemasFile)
	}
	other := strings.NewReplacer(m[1], "#"+m[1], m[3], m[4]).Replace(text)
	return map[string]string{"60s": m[2], "10s": m[5]}, map[string]string{"60s": text, "10s": other}
}

// What docs/graphite.md says of the disk.
func TestGraphiteDisk(t *testing.T) {
	retentions, _ := retentionsFor(t)
	page := harness.Section(t, graphitePage, "## Disk")
	for poll, kept := range retentions {
		size := float64(fileSize(archives(t, kept)))
		const perContainer = 38
		row := fmt.Sprintf("| `--poll=%s` | `%s` | %.2f MB | %.0f MB | %.1f GB |", poll, kept,
			size/1e6, perContainer*size/1e6, 100*perContainer*size/1e9)
		if !strings.Contains(page, row) {
			t.Errorf("%s lacks %s", graphitePage, row)
		}
	}
	// That many series a container has, give or take a few.
	table := harness.Section(t, "docs/metrics.md", "## Per container")
	table, _, _ = strings.Cut(table, "\n### ")
	for _, cgroup := range []string{"v1", "v2"} {
		n := len(regexp.MustCompile("(?m)^\\| `<c>[^|]*\\|[^|]*\\|[^|]*\\b"+cgroup+"\\b").
			FindAllString(table, -1))
		if n < 34 || n > 42 {
			t.Errorf("a container has up to %d series with cgroup %s, the page says 38", n, cgroup)
		}
	}
}

// send sends lines to Carbon, and waits until it has read them.
func send(t *testing.T, address string, lines []byte) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	harness.Must(t, err)
	defer conn.Close()
	_, err = conn.Write(lines)
	harness.Must(t, err)
	harness.Must(t, conn.(*net.TCPConn).CloseWrite())
	_, err = io.ReadAll(conn)
	harness.Must(t, err)
}

// fetched is what Graphite gets out of a Whisper file.
type fetched struct {
	Start, Step int
	Values      []*float64
}

// fetch asks as Graphite does for a graph that begins then: the finest archive that reaches back
// that far answers.
func fetch(t *testing.T, file string, from, until int) (f fetched) {
	t.Helper()
	out, err := exec.Command("whisper-fetch", "--json", fmt.Sprint("--from=", from),
		fmt.Sprint("--until=", until), file).Output()
	harness.Must(t, err)
	harness.Must(t, json.Unmarshal(out, &f))
	return f
}

// stored waits until Carbon has written a metric's point of that time.
func stored(t *testing.T, file string, at int) {
	t.Helper()
	harness.Await(t, time.Minute, fmt.Sprint(file, " has a point at ", at), func() bool {
		if _, err := os.Stat(file); err != nil {
			return false
		}
		f := fetch(t, file, at-1, at)
		return len(f.Values) > 0 && f.Values[0] != nil
	})
}

// past is a time of polls that is over. A counter goes up by 7 a second, and once begins anew. Of
// one hour, only one poll is there.
type past struct{ from, until, poll int }

// pastOf returns a time that an archive still has while the test runs.
func pastOf(a archive) past {
	until := int(time.Now().Unix()) / a.step * a.step
	return past{until - a.retention() + 10*60, until, a.step}
}

// polls returns the times of polls.
func (p past) polls() (times []int) {
	const hour = 3600
	hole := (p.from+p.until)/2/hour*hour - hour
	for at := p.from; at <= p.until; at += p.poll {
		if at < hole || at >= hole+hour || at == hole+20*60 {
			times = append(times, at)
		}
	}
	return times
}

// points returns what the polls found, by their times.
func (p past) points() (counter, gauge map[int]float64) {
	counter, gauge = map[int]float64{}, map[int]float64{}
	anew := (p.from + 3*p.until) / 4
	for i, at := range p.polls() {
		counter[at], gauge[at] = float64(1_000_000+7*(at-p.from)), float64(i*i%10)
		if at >= anew {
			counter[at] = float64(7 * (at - anew))
		}
	}
	return counter, gauge
}

const (
	aCounter = "docker.web1.web.cpu.total"
	aGauge   = "docker.web1.web.pids.current"
)

// lines returns what is sent of a part of it.
func (p past) lines(from, until int) []byte {
	var b bytes.Buffer
	counter, gauge := p.points()
	for _, at := range p.polls() {
		if at >= from && at <= until {
			fmt.Fprintf(&b, "%s %v %d\n%s %v %d\n", aCounter, counter[at], at, aGauge, gauge[at], at)
		}
	}
	return b.Bytes()
}

// rolledUp returns what becomes of points in steps of so many seconds.
func rolledUp(points map[int]float64, step int, how func([]float64) float64) map[int]float64 {
	in := map[int][]float64{}
	for _, at := range slices.Sorted(maps.Keys(points)) {
		in[at/step*step] = append(in[at/step*step], points[at])
	}
	rolled := map[int]float64{}
	for at, values := range in {
		rolled[at] = how(values)
	}
	return rolled
}

func last(values []float64) float64 { return values[len(values)-1] }

func average(values []float64) (v float64) {
	for _, value := range values {
		v += value
	}
	return v / float64(len(values))
}

// checkArchives compares what Graphite gets out of each archive with what was sent.
func (p past) checkArchives(t *testing.T, c *harness.Carbon, all []archive) {
	t.Helper()
	counter, gauge := p.points()
	from := p.from - p.poll
	for i, a := range all {
		if i > 0 { // further back than the finer archives reach
			from = int(time.Now().Unix()) - all[i-1].retention() - 2*a.step
		}
		counter, gauge = rolledUp(counter, a.step, last), rolledUp(gauge, a.step, average)
		found := fetch(t, c.File(aCounter), from, p.until)
		compare(t, found, a, counter)
		compare(t, fetch(t, c.File(aGauge), from, p.until), a, gauge)

		// As perSecond() does it: no rate without a point before, nor where the counter fell.
		steady, others := 0, map[int]float64{}
		for j := 1; j < len(found.Values); j++ {
			before, now := found.Values[j-1], found.Values[j]
			if before == nil || now == nil || *now < *before {
				continue
			}
			if rate := (*now - *before) / float64(a.step); rate == 7 {
				steady++
			} else {
				others[found.Start+j*a.step] = rate
			}
		}
		// Around the poll that stands alone, and in a last step that is not over, it is another.
		if steady == 0 || len(others) > 3 {
			t.Errorf("in steps of %d s perSecond is 7 at %d points, and %v", a.step, steady, others)
		}
	}
}

// compare compares what was found in an archive with what should be there.
func compare(t *testing.T, found fetched, a archive, want map[int]float64) {
	t.Helper()
	if found.Step != a.step {
		t.Fatalf("the steps are of %d s, want %d s", found.Step, a.step)
	}
	for at := range want {
		if i := (at - found.Start) / a.step; i < 0 || i >= len(found.Values) || found.Values[i] == nil {
			t.Errorf("in steps of %d s there is no point at %d", a.step, at)
		}
	}
	for i, v := range found.Values {
		at := found.Start + i*a.step
		if is, there := want[at]; v != nil && (!there || math.Abs(*v-is) > 1e-6) {
			t.Errorf("in steps of %d s there is %v at %d, want %v, %t", a.step, *v, at, is, there)
		}
	}
}

// Points of a past week (of a past day with --poll=10s) are there in each archive, averages and
// rates are right; without our sections nothing is left but the first.
func TestLiveCarbonKeeps(t *testing.T) {
	t.Parallel()
	retentions, files := retentionsFor(t)
	for poll, kept := range retentions {
		t.Run(poll, func(t *testing.T) {
			t.Parallel()
			all := archives(t, kept)
			c := harness.NewCarbon(t, files[poll], harness.ReadFile(t, aggregationFile))
			c.Start()
			p := pastOf(all[0])
			send(t, c.At(harness.Plaintext), p.lines(p.from, p.until))
			stored(t, c.File(aCounter), p.until)
			stored(t, c.File(aGauge), p.until)
			info, err := os.Stat(c.File(aCounter))
			if err != nil || int(info.Size()) != fileSize(all) {
				t.Errorf("%v, %v, not of %d bytes", info, err, fileSize(all))
			}
			p.checkArchives(t, c, all)
		})
	}
	t.Run("without our sections", func(t *testing.T) {
		t.Parallel()
		schemas := others(t, harness.ReadFile(t, schemasFile))
		c := harness.NewCarbon(t, schemas, others(t, harness.ReadFile(t, aggregationFile)))
		c.Start()
		all := archives(t, sectionOf(confSections(t, schemas), "docker.").values["retentions"])
		p := pastOf(archive{60, all[0].retention() / 60})
		send(t, c.At(harness.Plaintext), p.lines(p.from, p.until))
		file := c.File(aCounter)
		stored(t, file, p.until)
		count := func(from int) (step, n int) {
			f := fetch(t, file, from, p.until)
			for _, v := range f.Values {
				if v != nil {
					n++
				}
			}
			return f.Step, n
		}
		if step, n := count(p.from - p.poll); step != all[0].step || n != len(p.polls()) {
			t.Errorf("%d points in steps of %d s", n, step)
		}
		from := int(time.Now().Unix()) - all[0].retention() - 2*all[1].step
		if step, n := count(from); step != all[1].step || n != 0 {
			t.Errorf("%d points in steps of %d s, but docs/graphite.md says that there are none", n, step)
		}
	})
}

// Carbon itself understands the files as the tests do: each metric of docs/metrics.md.
func TestLiveCarbonRollsUp(t *testing.T) {
	t.Parallel()
	c := harness.NewCarbon(t, harness.ReadFile(t, schemasFile), harness.ReadFile(t, aggregationFile))
	c.Start()
	var lines bytes.Buffer
	now := time.Now().Unix()
	metrics := contracts(t)
	for metric := range metrics {
		for _, name := range series("docker", metric) {
			fmt.Fprintf(&lines, "%s 1 %d\n", name, now)
		}
	}
	send(t, c.At(harness.Plaintext), lines.Bytes())
	// https://graphite.readthedocs.io/en/latest/whisper.html#database-format
	type header struct {
		Method, MaxRetention uint32
		XFilesFactor         float32
		Archives, _, Step    uint32
	}
	for metric, is := range metrics {
		for _, name := range series("docker", metric) {
			var h header
			harness.Await(t, time.Minute, name+" has a file", func() bool {
				file, err := os.ReadFile(c.File(name))
				return err == nil && binary.Read(bytes.NewReader(file), binary.BigEndian, &h) == nil
			})
			want := header{Method: map[string]uint32{"gauge": 1, "counter": 3}[is.kind],
				MaxRetention: 2 * 365 * 86400, Archives: 3, Step: 60}
			if h != want {
				t.Errorf("%s has %+v, want %+v", name, h, want)
			}
		}
	}
}

// Files that were made by another schema get ours by the documented command, and keep their points.
func TestLiveCarbonFilesChange(t *testing.T) {
	t.Parallel()
	schemas, aggregation := harness.ReadFile(t, schemasFile), harness.ReadFile(t, aggregationFile)
	c := harness.NewCarbon(t, others(t, schemas), others(t, aggregation))
	c.Start()
	p := pastOf(archive{60, 5 * 60})
	seen := p.until - 60
	send(t, c.At(harness.Plaintext), append(p.lines(p.from, seen),
		fmt.Appendf(nil, "collectd.web1.load 1 %d\n", seen)...))
	foreign := c.File("collectd.web1.load")
	for _, file := range []string{c.File(aCounter), c.File(aGauge), foreign} {
		stored(t, file, seen)
	}
	before := harness.ReadFile(t, foreign)
	c.Kill()
	c.Configure(schemas, aggregation)
	runDocumented(t, "## Files that exist already", "whisper-auto-resize", map[string]string{
		"/var/lib/graphite/whisper": c.Dir + "/whisper", "/etc/carbon": c.Dir})
	c.Start()
	send(t, c.At(harness.Plaintext), p.lines(p.until, p.until))
	stored(t, c.File(aCounter), p.until)
	stored(t, c.File(aGauge), p.until)
	retentions, _ := retentionsFor(t)
	p.checkArchives(t, c, archives(t, retentions["60s"]))
	if harness.ReadFile(t, foreign) != before {
		t.Error("a file that is not ours was changed")
	}
}

// The documented commands remove what is dead, and only that.
func TestLiveCarbonDeadContainers(t *testing.T) {
	t.Parallel()
	c := harness.NewCarbon(t, harness.ReadFile(t, schemasFile), harness.ReadFile(t, aggregationFile))
	c.Start()
	now := int(time.Now().Unix()) / 60 * 60
	names := []string{"docker.web1.dead.cpu.total", "docker.web1.dead.uptime",
		"docker.web1.alive.uptime", "docker.gone.metrics.sampled", "collectd.web1.dead.uptime"}
	for _, name := range names {
		send(t, c.At(harness.Plaintext), fmt.Appendf(nil, "%s 1 %d\n", name, now-60))
	}
	old := time.Now().Add(-32 * 24 * time.Hour)
	for _, name := range names {
		stored(t, c.File(name), now-60)
		if !strings.Contains(name, "alive") {
			harness.Must(t, os.Chtimes(c.File(name), old, old))
		}
	}
	whisper := map[string]string{"/var/lib/graphite/whisper": c.Dir + "/whisper"}
	runDocumented(t, "## Containers that are gone", "find .* -name", whisper)
	runDocumented(t, "## Containers that are gone", "find .* -type d", whisper)
	var left []string
	walk := func(path string, _ fs.DirEntry, err error) error {
		left = append(left, path)
		return err
	}
	harness.Must(t, fs.WalkDir(os.DirFS(c.Dir), "whisper", walk))
	if want := []string{"whisper", "whisper/collectd", "whisper/collectd/web1",
		"whisper/collectd/web1/dead", "whisper/collectd/web1/dead/uptime.wsp", "whisper/docker",
		"whisper/docker/web1", "whisper/docker/web1/alive", "whisper/docker/web1/alive/uptime.wsp",
	}; !slices.Equal(left, want) {
		t.Errorf("left is %q, want %q", left, want)
	}
	// One that comes back has its files again.
	for _, name := range names[1:3] {
		send(t, c.At(harness.Plaintext), fmt.Appendf(nil, "%s 2 %d\n", name, now))
		stored(t, c.File(name), now)
	}
}

// VictoriaMetrics takes what is sent to carbon://. Killed, it loses only what it read between 5 s
// (after which it counts as delivered) and some ten seconds before.
func TestLiveVictoriaMetrics(t *testing.T) {
	t.Parallel()
	const api = "22428"
	v, dir := harness.NewServer(t, "victoria-metrics", "victoria-metrics")
	v.Arguments("-graphiteListenAddr="+v.At(harness.Plaintext), "-httpListenAddr="+v.At(api),
		"-storageDataPath="+filepath.Join(dir, "data"))
	v.Start()

	// Each poll has a number of its own.
	engine := harness.NewReplay(t, "cgroup2")
	answer := engine.Read("stats-one-shot-idle.json")
	read := regexp.MustCompile(`"read":"[^"]*"`)
	pids := regexp.MustCompile(`"pids_stats":\{"current":\d+`)
	var mu sync.Mutex
	var asked []time.Time
	engine.On("/containers/fx-idle/stats", func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		asked = append(asked, time.Now())
		n := len(asked)
		mu.Unlock()
		body := read.ReplaceAll(answer, []byte(`"read":"`+time.Now().UTC().Format(time.RFC3339)+`"`))
		w.Write(pids.ReplaceAll(body, fmt.Appendf(nil, `"pids_stats":{"current":%d`, n)))
	})
	polls := func() []time.Time {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(asked)
	}
	var log harness.Log
	daemon := exec.Command(harness.Program, "--backstop=carbon://"+v.At(harness.Plaintext)+"/docker",
		"--docker="+engine.URL, "--poll=2s", "--spool="+filepath.Join(dir, "spool"))
	daemon.Stderr = &log
	harness.Must(t, daemon.Start())
	t.Cleanup(func() {
		daemon.Process.Kill()
		daemon.Wait()
		if t.Failed() {
			t.Logf("log:\n%s", &log)
		}
	})

	has := func() (numbers map[int]bool) {
		numbers = map[int]bool{}
		answer, err := http.Get("http://" + v.At(api) + "/api/v1/export?match[]=" +
			url.QueryEscape(`{__name__="docker.fx-idle.pids.current"}`))
		if err != nil {
			return numbers // it listens in a moment
		}
		defer answer.Body.Close()
		for decoder := json.NewDecoder(answer.Body); ; {
			var series struct{ Values []float64 }
			if decoder.Decode(&series) != nil {
				return numbers
			}
			for _, n := range series.Values {
				numbers[int(n)] = true
			}
		}
	}
	harness.Await(t, time.Minute, "14 polls", func() bool { return len(polls()) >= 14 })
	v.Kill()
	killed := time.Now()
	v.Start()
	n := len(polls()) + 3
	harness.Await(t, time.Minute, "three more polls", func() bool { return len(polls()) > n })
	const proof, most = 5 * time.Second, 15 * time.Second
	missing := func() (late, its, lost []int) {
		there := has()
		for i, at := range polls()[:n] {
			age := killed.Sub(at)
			switch {
			case there[i+1]:
			case age < proof:
				late = append(late, i+1)
			case age < most:
				its = append(its, i+1)
			default:
				lost = append(lost, i+1)
			}
		}
		return late, its, lost
	}
	var its, lost []int
	harness.Await(t, time.Minute, "what was not delivered when it was killed", func() bool {
		var late []int
		late, its, lost = missing()
		return len(late) == 0
	})
	if len(lost) > 0 {
		t.Errorf("of %d polls %v are lost, read over %s before it was killed", n, lost, most)
	}
	t.Logf("%d polls, %v are VictoriaMetrics' own loss", n, its)
}
