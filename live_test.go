//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	"github.com/docker/go-units"
	docker "github.com/fsouza/go-dockerclient"
)

// The tests in this file run on a real Docker engine, with real containers.

// loop keeps one CPU busy, for ten minutes.
const loop = "exec /busybox timeout 600 /busybox sh -c 'while :; do :; done'"

// liveCollector returns a collector on e that names its containers as the test does, and its log.
func liveCollector(t *testing.T, e *harness.Engine) (*collector, *harness.Log) {
	t.Helper()
	c, log := collecting(t, e.Address, 30*time.Second)
	own := regexp.MustCompile(`^` + regexp.QuoteMeta(e.Name(t, "")) + `(.*)$`)
	c.containers.rules = renaming(own, "test.$1")
	return c, log
}

// byName makes a map of the metrics of the test's own containers: other ones may run here too.
func byName(t *testing.T, metrics []metric) map[string]metric {
	t.Helper()
	named := map[string]metric{}
	for _, m := range metrics {
		if name, ok := strings.CutPrefix(m.name(), "test."); ok {
			if old, double := named[name]; double {
				t.Errorf("%s is there twice: %v and %v", name, old, m)
			}
			named[name] = m
		}
		if !harness.IsGoodName(m.name()) {
			t.Errorf("%s is not a name that Graphite can keep", m.name())
		}
	}
	return named
}

// From starting to removing: what each state of a container means for its metrics.
func TestLiveContainers(t *testing.T) {
	e := harness.Usual(t)
	c, log := liveCollector(t, e)
	busy := e.Run(t, "busy", loop,
		docker.HostConfig{Memory: 32 << 20, CPUPeriod: 100_000, CPUQuota: 20_000})
	e.Run(t, "none", "", docker.HostConfig{NetworkMode: "none"})
	e.Run(t, "host", "", docker.HostConfig{NetworkMode: "host"})

	begin := time.Now()
	result := c.sweep(t.Context())
	if result.err != nil || result.failed > 0 {
		t.Fatalf("%v, %d failed: %s", result.err, result.failed, log.Take())
	}
	first := byName(t, result.metrics)
	for _, name := range []string{"cpu.total", "cpu.kernel", "cpu.user", "cpu.system", "memory.usage",
		"memory.limit", "uptime",
		"network.rx_bytes", "network.rx_packets", "network.rx_errors", "network.rx_dropped",
		"network.tx_bytes", "network.tx_packets", "network.tx_errors", "network.tx_dropped"} {
		at := time.Unix(first["busy."+name].time, 0)
		if at.Before(begin.Add(-2*time.Second)) || at.After(time.Now()) {
			t.Errorf("busy.%s is of %s", name, at)
		}
		for _, other := range []string{"none", "host"} {
			if _, there := first[other+"."+name]; there == strings.HasPrefix(name, "network.") {
				t.Errorf("%s.%s: there %t; a container without a network of its own has no network.*, and "+
					"all the rest", other, name, there)
			}
		}
	}
	if limit := first["busy.memory.limit"].value.n; limit != 32<<20 {
		t.Errorf("busy.memory.limit is %d, it was given 32 MiB", limit)
	}
	atFirst, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: busy})
	harness.Must(t, err)
	uptimeIs(t, first, "busy", atFirst.State.StartedAt)
	info, err := e.Info()
	harness.Must(t, err)
	total := metric{}
	for _, m := range result.metrics {
		if m.name() == graphiteNode(info.Name)+".containers.total" {
			total = m
		}
	}
	if total.value.n < 3 || int(total.value.n) != result.running {
		t.Errorf("%s.containers.total is %d", graphiteNode(info.Name), total.value.n)
	}

	// Work shows.
	for deadline := time.Now().Add(time.Minute); ; {
		now := byName(t, c.sweep(t.Context()).metrics)
		if now["busy.cpu.total"].value.n > first["busy.cpu.total"].value.n+uint64(200*time.Millisecond) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("busy.cpu.total went from %d to %d in a minute of work",
				first["busy.cpu.total"].value.n, now["busy.cpu.total"].value.n)
		}
	}

	// A paused container still runs, as far as the engine is concerned.
	harness.Must(t, e.PauseContainer(busy))
	paused := byName(t, c.sweep(t.Context()).metrics)
	if paused["busy.memory.usage"].value.n == 0 {
		t.Errorf("paused, there is %v", paused)
	}
	harness.Must(t, e.UnpauseContainer(busy))

	// Renamed, it goes by its new name.
	harness.Must(t, e.RenameContainer(docker.RenameContainerOptions{ID: busy,
		Name: e.Name(t, "renamed")}))
	renamed := byName(t, c.sweep(t.Context()).metrics)
	if renamed["renamed.cpu.total"].value.n < first["busy.cpu.total"].value.n ||
		renamed["busy.cpu.total"] != (metric{}) {
		t.Errorf("renamed, there is %v", renamed)
	}

	// Stopped, it has none; started again, all, and its uptime is that of the new start.
	harness.Must(t, e.KillContainer(docker.KillContainerOptions{ID: busy}))
	if _, err := e.WaitContainer(busy); err != nil {
		t.Fatal(err)
	}
	if stopped := byName(t, c.sweep(t.Context()).metrics); stopped["renamed.cpu.total"] != (metric{}) {
		t.Errorf("stopped, there is %v", stopped)
	}
	harness.Must(t, e.StartContainer(busy, nil))
	started, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: busy})
	harness.Must(t, err)
	again := byName(t, c.sweep(t.Context()).metrics)
	uptimeIs(t, again, "renamed", started.State.StartedAt)

	harness.Must(t, e.RestartContainer(busy, 0))
	restarted, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: busy})
	harness.Must(t, err)
	again = byName(t, c.sweep(t.Context()).metrics)
	uptimeIs(t, again, "renamed", restarted.State.StartedAt)

	harness.Must(t, e.Remove(busy))
	if removed := byName(t, c.sweep(t.Context()).metrics); removed["renamed.cpu.total"] != (metric{}) {
		t.Errorf("removed, there is %v", removed)
	}
	if got := log.Take(); strings.Contains(got, "level=ERROR") || strings.Contains(got, "level=WARN") {
		t.Errorf("all this is everyday life, but it logged\n%s", got)
	}
}

// uptimeIs compares a container's uptime, at the engine's reading, with when it was started.
func uptimeIs(t *testing.T, named map[string]metric, container string, since time.Time) {
	t.Helper()
	uptime, began := named[container+".uptime"], named[container+".uptime"].time
	got, want := time.Duration(uptime.value.n)*time.Second, time.Unix(began, 0).Sub(since)
	// It is read after the poll began, at the next tick of an engine that has some.
	if got > want+4*time.Second || got < want-time.Second {
		t.Errorf("the uptime is %v at %d, it was started at %s", uptime, began, since)
	}
}

// Names from labels and images, hostile ones too: whatever is in them, what comes out is one safe
// name for each.
func TestLiveRules(t *testing.T) {
	e := harness.Usual(t)
	forged := "x 1 1\nroot.forged 1 1795409680\n"
	first := e.Labelled(t, "first", map[string]string{"test": "name", "evil": forged})
	second := e.Labelled(t, "second",
		map[string]string{"test": "name", "evil": "../../etc;tag=*{a,b}[c]?\t\x00é"})
	e.Labelled(t, "third", map[string]string{"test": "off", "evil": "off", forged: forged})

	sweep := func(text string) (names []string, log string) {
		t.Helper()
		c, logged := liveCollector(t, e)
		c.containers.rules = mustRules(t, text)
		c.host = "h"
		result := c.sweep(t.Context())
		if result.err != nil {
			t.Fatal(result.err)
		}
		for _, m := range result.metrics {
			if !harness.IsGoodName(m.name()) {
				t.Errorf("%s makes %q", text, m.name())
			}
			if name, ok := strings.CutSuffix(m.name(), ".pids.current"); ok &&
				strings.HasPrefix(name, "test.") {
				names = append(names, name)
			}
			if category, ok := strings.CutPrefix(m.name(), "h.containers.cat"); ok {
				names = append(names, fmt.Sprintf("%s=%d", category, m.value.n))
			}
		}
		slices.Sort(names)
		return names, logged.Take()
	}
	for _, test := range []struct {
		rules string
		want  []string
	}{
		{`{"from":"label:evil","regexp":"(?s)^(.*)$","into":"test.$1"}`,
			[]string{"test._._etc_tag___a_b__c_____", "test.off", "test.x_1_1_root.forged_1_1795409680_"}},
		{`[{"from":"label:test","regexp":"off","drop":true},{"from":"label:test","regexp":".*",` +
			`"into":"test.${label:evil}","category":"cat1"},{"from":"label:nobody","regexp":"",` +
			`"category":"cat3"}]`,
			[]string{"1=2", "3=0", "test.______etc_tag___a_b__c_____",
				"test.x_1_1_root_forged_1_1795409680_"}},
		{`{"from":"image","regexp":"^docker-stats-to-backstop-test:testliverules-.*$",` +
			`"into":"test.${label:test}.${label:evil}"}`,
			[]string{"test.name.______etc_tag___a_b__c_____", "test.name.x_1_1_root_forged_1_1795409680_",
				"test.off.off"}},
		{`{"from":"id","regexp":"^` + first + `$","into":"test.id"}`, []string{"test.id"}},
	} {
		if got, _ := sweep(test.rules); !slices.Equal(got, test.want) {
			t.Errorf("%s makes %q, want %q", test.rules, got, test.want)
		}
	}

	// Two of one name: one of them has it, until it goes; the older one, if they are not of the same
	// second.
	c, log := liveCollector(t, e)
	c.containers.rules = mustRules(t, `[{"from":"label:test","regexp":"^name$","into":"test.same"},`+
		`{"regexp":"","drop":true}]`)
	c.sweep(t.Context())
	holder, other, left := e.Name(t, "first"), e.Name(t, "second"), second
	if c.containers.holders["test.same"].ID == second {
		holder, other, left = other, holder, first
	}
	if got := log.Take(); strings.Count(got, fmt.Sprintf("container=%s other=%s metrics=test.same",
		other, holder)) != 1 {
		t.Errorf("logged %s", got)
	}
	harness.Must(t, e.Remove(holder))
	result := c.sweep(t.Context())
	if c.containers.holders["test.same"].ID != left ||
		byName(t, result.metrics)["same.pids.current"].value.n == 0 {
		t.Errorf("%s is gone, and %s has not taken over", holder, other)
	}

	// A newer image takes the name: then the list has an id instead, but what a container was made of
	// stays its name.
	byImage := `{"from":"image","regexp":"^docker-stats-to-backstop-test:testliverules-.*$",` +
		`"into":"test.${label:test}"}`
	before, _ := sweep(byImage)
	var root bytes.Buffer
	archive := tar.NewWriter(&root)
	archive.WriteHeader(&tar.Header{Name: "newer", Mode: 0o644})
	archive.Close()
	repository, tag, _ := strings.Cut(e.Image, ":")
	harness.Must(t, e.ImportImage(docker.ImportImageOptions{Repository: repository, Tag: tag,
		Source: "-", InputStream: &root, OutputStream: io.Discard}))
	byID := docker.ListContainersOptions{Filters: map[string][]string{"id": {left}}}
	list, err := e.ListContainers(byID)
	harness.Must(t, err)
	if len(list) != 1 || !imageID.MatchString(list[0].Image) {
		t.Errorf("the list has %v; was there no newer image?", list)
	}
	if after, _ := sweep(byImage); len(before) != 2 || !slices.Equal(after, before) {
		t.Errorf("there was %q, now there is %q", before, after)
	}
}

// dockerStats is what the docker command prints of a container, field by field.
func dockerStats(
	t *testing.T, e *harness.Engine, id string,
) (memory, memoryPercent string, cpuPercent float64) {
	t.Helper()
	command, err := exec.LookPath("docker")
	if err != nil {
		harness.NoEngine(t, "no docker command to compare with: %v", err)
	}
	out, err := exec.Command(command, "--host", e.Address, "stats", "--no-stream", "--format",
		"{{.MemUsage}}|{{.MemPerc}}|{{.CPUPerc}}", id).Output()
	harness.Must(t, err)
	fields := strings.Split(strings.TrimSpace(string(out)), "|")
	if len(fields) != 3 {
		t.Fatalf("docker stats printed %s", out)
	}
	memory, _, _ = strings.Cut(fields[0], " / ")
	cpuPercent, err = strconv.ParseFloat(strings.TrimSuffix(fields[2], "%"), 64)
	harness.Must(t, err)
	return memory, strings.TrimSuffix(fields[1], "%"), cpuPercent
}

// Of memory that does not change, docker stats prints the very same; it rounds to four digits.
func TestLiveMemoryIsThatOfDockerStats(t *testing.T) {
	e := harness.Usual(t)
	c, _ := liveCollector(t, e)
	// A file that was written once, and never read, is page cache that is not in use, the one part
	// that is left out.
	id := e.Run(t, "cache", "/busybox dd if=/dev/zero of=/file bs=1M count=8; echo done >/done; "+
		"exec /busybox sleep 600", docker.HostConfig{Memory: 64 << 20})
	awaitFile(t, e, id, "/done")
	var ours, theirs string
	for range 10 { // the kernel may still be at work on the cache
		memory, percent, _ := dockerStats(t, e, id)
		named := byName(t, c.sweep(t.Context()).metrics)
		usage, workingSet := named["cache.memory.usage"].value.n,
			named["cache.memory.working_set"].value.n
		if usage-workingSet < 1<<20 {
			t.Fatalf("usage %d, working set %d: there is no cache to leave out", usage, workingSet)
		}
		percentage, err := strconv.ParseFloat(string(named["cache.memory.percent"].value.append(nil)), 64)
		harness.Must(t, err)
		ours = fmt.Sprintf("%s %.2f", units.BytesSize(float64(workingSet)), percentage)
		theirs = memory + " " + percent
		if ours == theirs {
			return
		}
	}
	t.Errorf("memory is %s, docker stats prints %s", ours, theirs)
}

// awaitFile waits until a container has made a file.
func awaitFile(t *testing.T, e *harness.Engine, id, path string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		file := docker.DownloadFromContainerOptions{Path: path, OutputStream: io.Discard}
		err := e.DownloadFromContainer(id, file)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %s after a minute: %v", path, err)
		}
	}
}

// Of a steady load, cpu.percent is what docker stats prints. That looks at one second, so at ten
// periods of the limit, one more or less of which is 3 points; ours is the mean over all the time
// between. Five points are room for a machine that does other things as well.
func TestLiveCPUIsThatOfDockerStats(t *testing.T) {
	e := harness.Usual(t)
	c, _ := liveCollector(t, e)
	id := e.Run(t, "steady", loop,
		docker.HostConfig{CPUPeriod: 100_000, CPUQuota: 30_000})
	if first := byName(t, c.sweep(t.Context()).metrics); first["steady.cpu.percent"] != (metric{}) {
		t.Errorf("a first sample has the percentage %v", first["steady.cpu.percent"])
	}
	const looks = 5
	var theirs float64
	for range looks {
		_, _, percent := dockerStats(t, e, id)
		theirs += percent / looks
	}
	now := byName(t, c.sweep(t.Context()).metrics)
	ours, err := strconv.ParseFloat(string(now["steady.cpu.percent"].value.append(nil)), 64)
	harness.Must(t, err)
	if math.Abs(ours-theirs) > 5 || ours > 33 {
		t.Errorf("cpu.percent is %v, docker stats prints %v on average; the limit is 30", ours, theirs)
	}

	harness.Must(t, e.RestartContainer(id, 0))
	if again := byName(t, c.sweep(t.Context()).metrics); again["steady.cpu.total"] == (metric{}) ||
		again["steady.cpu.percent"] != (metric{}) {
		t.Errorf("after a restart there is the percentage %v", again["steady.cpu.percent"])
	}
	if last := byName(t, c.sweep(t.Context()).metrics); last["steady.cpu.percent"] == (metric{}) {
		t.Errorf("at the second sample after a restart, there is no percentage")
	}
}

// Podman, through the API that it shares with Docker, with containers of its own.
func TestLivePodman(t *testing.T) {
	for _, command := range []string{"podman", "runc"} {
		if _, err := exec.LookPath(command); err != nil || os.Getuid() != 0 {
			harness.NoEngine(t, "a Podman of the test's own needs root and %s (%v)", command, err)
		}
	}
	dir, err := os.MkdirTemp("", "dstb")
	harness.Must(t, err)
	podman := func(args ...string) *exec.Cmd {
		return exec.Command("podman",
			append([]string{"--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver", "vfs",
				"--runtime", "runc"}, args...)...)
	}
	do := func(args ...string) {
		t.Helper()
		if out, err := podman(args...).CombinedOutput(); err != nil {
			t.Fatalf("podman %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	t.Cleanup(func() {
		podman("rm", "--all", "--force", "--time", "0").Run()
		podman("rmi", "--all", "--force").Run()
		harness.RemoveEngine(t, dir)
	})
	do("import", harness.BusyboxTar(t, dir), "test")
	// crun, the other runtime, is not to be found everywhere; nor may it raise its limits.
	run := func(name, script string, options ...string) {
		do(slices.Concat([]string{"run", "--detach", "--name", "dstb." + name, "--network", "none",
			"--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"}, options,
			[]string{"test", "/busybox", "timeout", "600", "/busybox", "sh", "-c", script})...)
	}
	run("busy", "while :; do :; done")
	run("idle", "/busybox sleep 600")
	run("stopped", "exit")
	run("sick", "/busybox sleep 600", "--health-cmd", "/busybox false",
		"--health-interval", "disable", "--health-retries", "1")
	podman("healthcheck", "run", "dstb.sick").Run() // which fails, as it should
	socket := dir + "/podman.sock"
	service := podman("system", "service", "--time=0", "unix://"+socket)
	harness.Must(t, service.Start())
	t.Cleanup(func() {
		service.Process.Kill()
		service.Wait()
	})
	e, err := newEngine("unix://"+socket, 30*time.Second)
	harness.Must(t, err)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err = e.hello(t.Context()); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("podman system service: %v", err)
		}
	}

	log := &harness.Log{}
	c := newCollector(e, renaming(regexp.MustCompile(`^dstb\.`), "test."), log.Logger())
	c.sweep(t.Context())
	run("late", "exit 3")
	<-time.After(3 * time.Second) // the span that is measured
	result := c.sweep(t.Context())
	if got := log.Take(); result.err != nil || result.failed > 0 || result.running != 3 ||
		strings.Contains(got, "level=ERROR") {
		t.Fatalf("%v, %d of %d failed: %s", result.err, result.failed, result.running, got)
	}
	named := byName(t, result.metrics)
	for _, name := range []string{"cpu.total", "cpu.percent", "cpu.online", "memory.usage",
		"memory.working_set", "memory.limit", "pids.current", "uptime", "restarts"} {
		for _, of := range []string{"busy.", "idle."} {
			if _, there := named[of+name]; !there {
				t.Errorf("there is no %s%s: %v", of, name, named)
			}
		}
	}
	if m, there := named["sick.health"]; !there || m.value.n != 0 {
		t.Errorf("the health of one whose check fails is %v, there %t", m, there)
	}
	if _, there := named["idle.health"]; there {
		t.Errorf("idle has no health check, and a health")
	}
	if now := c.events.counts; now[started] != 1 || now[failed] != 1 || now[ended] != 0 {
		t.Errorf("of one container that failed between two polls, the events tell %+v", now)
	}
	if cache, there := named["busy.memory.cache"]; there {
		t.Errorf("Podman sends no cache, but there is %v", cache)
	}
	// A loop that never rests takes what it can get of one CPU, and never more, which Podman's own
	// idea of the host's CPU time would make of it.
	busy, err := strconv.ParseFloat(string(named["busy.cpu.percent"].value.append(nil)), 64)
	harness.Must(t, err)
	if busy < 10 || busy > 105 {
		t.Errorf("busy.cpu.percent is %v", busy)
	}
}

// Containers that stop, restart or are removed in the very moment they are asked.
func TestLiveChangesDuringASweep(t *testing.T) {
	e := harness.Usual(t)
	steady := e.Run(t, "steady", "", docker.HostConfig{})
	for _, test := range []struct {
		why    string
		change func(id string) error
		gone   bool
	}{
		{"stopped", func(id string) error { return e.KillContainer(docker.KillContainerOptions{ID: id}) },
			true},
		{"removed", e.Remove, true},
		{"restarted", func(id string) error { return e.RestartContainer(id, 0) }, false},
		{"paused", e.PauseContainer, false},
	} {
		id := e.Run(t, test.why, "", docker.HostConfig{})
		changed := false
		proxied := harness.Between(t, e, func(
			w http.ResponseWriter, r *http.Request, forward http.Handler,
		) {
			// Between the list and the question for its stats.
			if r.URL.Path == "/containers/"+id+"/stats" && !changed {
				changed = true
				if err := test.change(id); err != nil {
					t.Error(err)
				}
			}
			forward.ServeHTTP(w, r)
		})
		c, log := liveCollector(t, proxied)
		result := c.sweep(t.Context())
		named := byName(t, result.metrics)
		if result.err != nil || result.failed > 0 {
			t.Errorf("%s: %v, %d failed: %s", test.why, result.err, result.failed, log.Take())
		}
		if named["steady.cpu.total"].value.n == 0 {
			t.Errorf("%s: it cost another one its metrics: %v", test.why, named)
		}
		_, there := named[test.why+".cpu.total"]
		got := log.Take()
		if there == test.gone || strings.Contains(got, "container="+e.Name(t, test.why)) {
			t.Errorf("%s: there are %v, and the log\n%s", test.why, named, got)
		}
	}
	harness.Must(t, e.Remove(steady))
}

// Two real containers out of three answer badly, because a proxy makes them: they cost the
// third nothing.
func TestLiveBadAnswers(t *testing.T) {
	e := harness.Usual(t)
	e.Run(t, "well", "", docker.HostConfig{})
	hanging := e.Run(t, "hangs", "", docker.HostConfig{})
	cut := e.Run(t, "cut", "", docker.HostConfig{})
	proxied := harness.Between(t, e, func(
		w http.ResponseWriter, r *http.Request, forward http.Handler,
	) {
		switch r.URL.Path {
		case "/containers/" + hanging + "/stats":
			harness.Hang(w, r)
		case "/containers/" + cut + "/stats":
			answer := httptest.NewRecorder()
			forward.ServeHTTP(answer, r)
			w.Write(answer.Body.Bytes()[:100])
		default:
			forward.ServeHTTP(w, r)
		}
	})
	c, log := liveCollector(t, proxied)
	c.engine.timeout = 5 * time.Second
	result := c.sweep(t.Context())
	named := byName(t, result.metrics)
	if result.err != nil || result.failed != 2 || named["well.cpu.total"].value.n == 0 ||
		named["hangs.cpu.total"].value.n != 0 || named["cut.cpu.total"].value.n != 0 {
		t.Errorf("%v, %d failed, %v", result.err, result.failed, named)
	}
	got := log.Take()
	for _, want := range []string{
		`msg="container cannot be read" container=` + e.Name(t, "hangs") + ` error="no answer within 5s"`,
		`msg="container cannot be read" container=` + e.Name(t, "cut") +
			` error="its stats answer is not what was asked for: unexpected EOF"`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("logged\n%swant %s", got, want)
		}
	}
}

// The daemon, as a process of its own, outlives its engine: killed and started again.
func TestLiveEngineIsKilled(t *testing.T) {
	own := harness.StartOwn(t)
	e := harness.Connect(t, own.Address)
	e.Run(t, "web", "", docker.HostConfig{})

	backstop := harness.NewStandIn(t)
	log := filepath.Join(t.TempDir(), "log")
	stderr, err := os.Create(log)
	harness.Must(t, err)
	defer stderr.Close()
	// The command is in the path, see testscript.Main.
	daemon := exec.Command(program, "--backstop="+backstop.URL+"/publish/docker",
		"--docker="+own.Address, "--poll=2s", "--host=h")
	daemon.Stderr = stderr
	harness.Must(t, daemon.Start())
	t.Cleanup(func() { daemon.Process.Kill() })
	arrive := func(when string, want int) {
		t.Helper()
		if err := backstop.Await(`^dstb-.*\.web\.cpu\.total `, want, 2*time.Minute); err != nil {
			text, _ := os.ReadFile(log)
			t.Fatalf("%s: %v\n%s", when, err, text)
		}
	}
	count := func() int { return strings.Count(backstop.Lines(), ".web.cpu.total ") }
	logs := func() string { return harness.ReadFile(t, log) }
	arrive("at first", 2)
	own.Kill()
	harness.AwaitText(t, logs, `level=ERROR msg="Docker engine does not answer`, 1)
	own.Start()
	harness.AwaitText(t, logs, `level=INFO msg="Docker engine answers"`, 2)
	// Killed, the engine took its containers along.
	if err := e.StartContainer(e.Name(t, "web"), nil); err != nil &&
		!errors.As(err, new(*docker.ContainerAlreadyRunning)) {
		t.Fatal(err)
	}
	arrive("after the engine was killed and started", count()+2)

	harness.Must(t, daemon.Process.Signal(syscall.SIGTERM))
	if err := daemon.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// What happens between two polls is counted, once, whatever is left of it when the engine is asked.
func TestLiveEvents(t *testing.T) {
	e := harness.Usual(t)
	c, log := liveCollector(t, e)
	counted := func() (now [5]uint64) {
		t.Helper()
		named := map[string]uint64{}
		for _, m := range c.sweep(t.Context()).metrics {
			named[m.own] = m.value.n
		}
		for i, name := range []string{"start", "die", "die_nonzero", "oom", "unhealthy"} {
			n, there := named[".events."+name]
			if !there {
				t.Fatalf("no %s", name)
			}
			now[i] = n
		}
		return now
	}
	if first := counted(); first != [5]uint64{} {
		t.Errorf("the first poll has %v", first)
	}
	// tail keeps what it has read, and this has no line end.
	e.Run(t, "oom", "exec /busybox tail /dev/zero", docker.HostConfig{Memory: 6 << 20,
		MemorySwap: 6 << 20, NetworkMode: "none"})
	e.Run(t, "well", "exit 0", docker.HostConfig{NetworkMode: "none"})
	for _, name := range []string{"oom", "well"} {
		_, err := e.WaitContainer(e.Name(t, name))
		harness.Must(t, err)
		harness.Must(t, e.Remove(e.Name(t, name)))
	}
	// Other tests may use the engine, too.
	var now [5]uint64
	deadline := time.Now().Add(time.Minute)
	for now[0] < 2 || now[1] < 2 || now[2] < 1 || now[3] < 1 {
		if now = counted(); time.Now().After(deadline) {
			t.Fatalf("start, die, die_nonzero, oom, unhealthy are %v: %s", now, log.Take())
		}
	}
	t.Log(now)
}

// The limit of CPUs is right again after an update.
func TestLiveCPULimit(t *testing.T) {
	e := harness.Usual(t)
	c, _ := liveCollector(t, e)
	id := e.Run(t, "limited", "", docker.HostConfig{NanoCPUs: 1_500_000_000, NetworkMode: "none"})
	limit := func() string {
		m := byName(t, c.sweep(t.Context()).metrics)["limited.cpu.limit"]
		return string(m.value.append(nil))
	}
	if got := limit(); got != "1.5" {
		t.Errorf("the limit is %s", got)
	}
	harness.Must(t, e.UpdateContainer(id, docker.UpdateContainerOptions{CpusetCpus: "0"}))
	for deadline := time.Now().Add(time.Minute); limit() != "1"; {
		if time.Now().After(deadline) {
			t.Fatalf("after the update, the limit is %s", limit())
		}
	}
}

// A container that ends at once and is restarted for ever is never called gone or failed, and has
// one line in the log.
func TestLiveCrashLoop(t *testing.T) {
	e := harness.Usual(t)
	c, log := liveCollector(t, e)
	e.Run(t, "loop", "exit 7", docker.HostConfig{NetworkMode: "none",
		RestartPolicy: docker.AlwaysRestart()})
	var restarts metric
	for deadline := time.Now().Add(time.Minute); restarts.value.n < 4; {
		result := c.sweep(t.Context())
		if result.err != nil || result.failed > 0 {
			t.Fatalf("%v, %d failed: %s", result.err, result.failed, log.Take())
		}
		if now, there := byName(t, result.metrics)["loop.restarts"]; there {
			restarts = now
		}
		if time.Now().After(deadline) {
			t.Fatalf("restarted %d times in a minute", restarts.value.n)
		}
	}
	got := log.Take()
	about := regexp.MustCompile(`(?m)^.* container=`+regexp.QuoteMeta(e.Name(t, "loop"))+` .*$`).
		FindAllString(got, -1)
	if len(about) != 1 || !strings.Contains(about[0], "restart loop") ||
		!strings.Contains(about[0], "exit_code=7") || strings.Contains(got, "level=ERROR") {
		t.Errorf("logged %s", got)
	}
}

// The tests from here on hold for both versions of cgroups; script/test-cgroup2 runs them with v2.

// sweepUntil sweeps until the metrics are as wanted, and returns them. It fails t after a minute.
func sweepUntil(
	t *testing.T, c *collector, what string, wanted func(map[string]metric) bool,
) map[string]metric {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		named := byName(t, c.sweep(t.Context()).metrics)
		if wanted(named) {
			return named
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after a minute; there is %v", what, named)
		}
	}
}

// goldenNames returns the names of a recorded container's metrics, from an engine with the same
// version of cgroups as e.
func goldenNames(t *testing.T, e *harness.Engine, container string) (names []string) {
	t.Helper()
	client := http.Client{Transport: harness.Transport(e.Address)}
	resp, err := client.Get("http://engine/info")
	harness.Must(t, err)
	defer resp.Body.Close()
	var info struct{ CgroupVersion string }
	harness.Must(t, json.NewDecoder(resp.Body).Decode(&info))
	version := cmp.Or(info.CgroupVersion, "1") // Docker says it since 20.10
	golden := "testdata/engine/cgroup" + version + "/stats-one-shot-" + container + ".golden"
	for line := range strings.Lines(harness.ReadFile(t, golden)) {
		name, _, _ := strings.Cut(line, " ")
		names = append(names, name)
	}
	return names
}

// withoutDevices returns the sorted names with the same number for each block device.
func withoutDevices(names []string) []string {
	number := regexp.MustCompile(`\.blkio\.\d+_\d+\.`)
	var all []string
	for _, name := range names {
		all = append(all, number.ReplaceAllString(name, ".blkio.0_0."))
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// A real engine sends what the recorded ones sent, no more and no less.
func TestLiveNamesAreTheGoldens(t *testing.T) {
	e := harness.Usual(t)
	// Without a write to the disk there is no blkio.
	const write = "/busybox dd if=/dev/zero of=/file bs=1M count=1 conv=fsync; echo done >/done; "
	pids := int64(50)
	idle := e.Run(t, "idle", write+"exec /busybox sleep 600", docker.HostConfig{})
	busy := e.Run(t, "busy", write+loop, docker.HostConfig{
		Memory: 64 << 20, CPUPeriod: 100_000, CPUQuota: 20_000, PidsLimit: &pids,
	})
	awaitFile(t, e, idle, "/done")
	awaitFile(t, e, busy, "/done")
	c, _ := liveCollector(t, e)
	c.per = details{core: true, iface: true, device: true}

	fromInspect := regexp.MustCompile(`\.(uptime|restarts|cpu\.limit|oom_kills|failed_exits)$`)
	names := map[string][]string{}
	for name := range byName(t, c.sweep(t.Context()).metrics) {
		if of, rest, _ := strings.Cut(name, "."); !fromInspect.MatchString(name) {
			names[of] = append(names[of], "c."+rest)
		}
	}
	for _, name := range []string{"idle", "busy"} {
		got, want := withoutDevices(names[name]), withoutDevices(goldenNames(t, e, name))
		if !slices.Equal(got, want) {
			t.Errorf("%s sends\n%s\nwhere the recorded one sent\n%s",
				name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// A restart by Docker's restart policy counts, and begins a new uptime.
func TestLiveRestarts(t *testing.T) {
	e := harness.Usual(t)
	c, _ := liveCollector(t, e)
	const falls = "until [ -e /fall ]; do /busybox sleep 0.1; done; /busybox rm /fall; exit 1"
	id := e.Run(t, "falls", falls, docker.HostConfig{RestartPolicy: docker.RestartOnFailure(10)})
	for restarts := range uint64(3) {
		what := fmt.Sprintf("%d restarts", restarts)
		sweepUntil(t, c, what, func(named map[string]metric) bool {
			_, runs := named["falls.cpu.total"]
			return runs && named["falls.restarts"].value.n == restarts
		})
		container, err := e.InspectContainerWithOptions(docker.InspectContainerOptions{ID: id})
		harness.Must(t, err)
		// A sweep that began before the container did is not the one to look at.
		named := byName(t, c.sweep(t.Context()).metrics)
		uptimeIs(t, named, "falls", container.State.StartedAt)
		e.Exec(t, id, "/busybox", "touch", "/fall")
	}
}

// How containers ended is counted by their name: also of one that is made anew under it, is
// restarted again and again, or was there between two polls only.
func TestLiveEnds(t *testing.T) {
	e := harness.Usual(t)
	c, log := liveCollector(t, e)
	none := docker.HostConfig{NetworkMode: "none"}
	const waits = "until [ -e /fall ]; do /busybox sleep 0.1; done; "
	tight := docker.HostConfig{NetworkMode: "none", Memory: 6 << 20, MemorySwap: 6 << 20}
	ids := []string{
		e.Run(t, "fails", waits+"exit 1", none),
		// tail keeps what it has read, and this has no line end.
		e.Run(t, "oom", waits+"exec /busybox tail /dev/zero", tight),
		e.Run(t, "well", waits+"exit 0", none),
	}
	e.Run(t, "job", "", none)
	last := map[string]metric{} // the last point of each, as Graphite has it
	is := func(name string) uint64 { return last[name].value.n }
	until := func(what string, wanted func() bool) {
		t.Helper()
		sweepUntil(t, c, what, func(named map[string]metric) bool {
			maps.Copy(last, named)
			return wanted()
		})
	}
	until("at first", func() bool { return len(last) > 0 })
	for _, name := range []string{"fails", "oom", "well", "job"} {
		for _, of := range []string{".oom_kills", ".failed_exits"} {
			if m, there := last[name+of]; !there || m.value.n != 0 {
				t.Errorf("%s%s begins with %v, %t", name, of, m, there)
			}
		}
	}
	remove := func(name string) {
		t.Helper()
		_, err := e.WaitContainer(e.Name(t, name))
		harness.Must(t, err)
		harness.Must(t, e.Remove(e.Name(t, name)))
	}
	for _, id := range ids {
		e.Exec(t, id, "/busybox", "touch", "/fall")
	}
	remove("fails")
	remove("oom")
	remove("well")
	until("exit 1, and an OOM kill", func() bool {
		return is("fails.failed_exits") == 1 && is("oom.failed_exits") == 1 && is("oom.oom_kills") > 0
	})
	e.Run(t, "fails", waits+"exit 1", none)
	delete(last, "fails.failed_exits")
	until("made anew", func() bool { return is("fails.failed_exits") == 1 })
	harness.Must(t, e.Remove(e.Name(t, "job"))) // which kills it
	until("killed", func() bool { return is("job.failed_exits") == 1 })
	for range 2 {
		e.Run(t, "job", "exit 3", none)
		remove("job")
	}
	until("there between two polls, twice", func() bool { return is("job.failed_exits") == 3 })
	e.Run(t, "loop", "exit 7", docker.HostConfig{NetworkMode: "none",
		RestartPolicy: docker.AlwaysRestart()})
	until("a crash loop", func() bool {
		return is("loop.failed_exits") > 3 && is("loop.restarts") > 2
	})
	if n := is("fails.oom_kills") + is("well.failed_exits") + is("well.oom_kills") +
		is("job.oom_kills") + is("loop.oom_kills"); n != 0 || is("fails.failed_exits") != 1 {
		t.Errorf("in the end there are %v", last)
	}
	if got := log.Take(); strings.Contains(got, "level=ERROR") {
		t.Errorf("it logged %s", got)
	}
}

// Health is what the container's own check says; without one there is none.
func TestLiveHealth(t *testing.T) {
	e := harness.Usual(t)
	c, _ := liveCollector(t, e)
	check := func(name string, test ...string) string {
		return e.Start(t, name, docker.Config{
			Cmd: []string{"/busybox", "sleep", "600"},
			Healthcheck: &docker.HealthConfig{
				Test: test, Interval: time.Second, Timeout: 30 * time.Second, Retries: 1,
			},
		}, docker.HostConfig{NetworkMode: "none"})
	}
	turns := check("turns", "CMD", "/busybox", "test", "!", "-e", "/ill")
	check("ill", "CMD", "/busybox", "false")
	e.Run(t, "without", "", docker.HostConfig{NetworkMode: "none"})
	health := func(turns uint64) func(named map[string]metric) bool {
		return func(named map[string]metric) bool {
			of, there := named["turns.health"]
			ill, illThere := named["ill.health"]
			if without, there := named["without.health"]; there {
				t.Fatalf("without a check there is %v", without)
			}
			return there && of.value.n == turns && illThere && ill.value.n == 0
		}
	}
	sweepUntil(t, c, "one is healthy, one is not", health(1))
	e.Exec(t, turns, "/busybox", "touch", "/ill")
	sweepUntil(t, c, "both are unhealthy", health(0))
	e.Exec(t, turns, "/busybox", "rm", "/ill")
	sweepUntil(t, c, "one is healthy again", health(1))
}
