//go:build linux

package script_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	docker "github.com/fsouza/go-dockerclient"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sync/errgroup"
)

// What a sweep costs, beside the floor: the same requests to the same engine, with their answers
// thrown away. script/bench shows it.

func TestMain(m *testing.M) {
	testscript.Main(harness.Built{M: m}, map[string]func(){"floor": floor})
}

// costs are those of a process for a sweep.
type costs struct {
	wall   time.Duration // the median
	cpu    time.Duration // the mean
	engine time.Duration // the engine's, the mean; 0 where that is not known
	peak   int           // kB of memory
}

// cpuOf returns the CPU time that processes have used.
func cpuOf(pids ...int) (used time.Duration) {
	for _, pid := range pids {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		for _, thread := range threads {
			text, _ := os.ReadFile(thread)
			ns, _, _ := strings.Cut(string(text), " ")
			n, _ := strconv.ParseInt(ns, 10, 64)
			used += time.Duration(n)
		}
		used += ofChildren(pid)
	}
	return used
}

// ofChildren returns the CPU time of children that have ended: an engine starts some for
// a call of /info. https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
func ofChildren(pid int) (used time.Duration) {
	const tick = 10 * time.Millisecond
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ") // behind the name, which may have blanks
	if fields := strings.Fields(rest); len(fields) > 14 {
		for _, ticks := range fields[13:15] { // cutime, cstime
			n, _ := strconv.ParseInt(ticks, 10, 64)
			used += time.Duration(n) * tick
		}
	}
	return used
}

// peakOf returns the most memory that a process has had, in kB.
func peakOf(pid int) int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(text)
	if m == nil {
		return 0
	}
	kB, _ := strconv.Atoi(string(m[1]))
	return kB
}

// measure runs a command that sweeps at each tick until it has done so some times, and returns its
// costs for one sweep. A sweep is over with a line that matches over; walls have their duration as
// first group.
func measure(b *testing.B, command *exec.Cmd, sweeps int, over, walls *regexp.Regexp,
	engine []int) costs {
	b.Helper()
	out, err := command.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	command.Stderr = command.Stdout
	if err := command.Start(); err != nil {
		b.Fatal(err)
	}
	defer command.Wait()
	defer command.Process.Kill()
	const warmUp = 3 // of which the first asks for more, and the pools are filled
	var took []time.Duration
	var own, theirs time.Duration
	done := 0
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if m := walls.FindStringSubmatch(lines.Text()); m != nil && done >= warmUp {
			d, err := time.ParseDuration(m[1])
			if err != nil {
				b.Fatal(err)
			}
			took = append(took, d)
		}
		if !over.MatchString(lines.Text()) {
			continue
		}
		switch done++; done {
		case warmUp:
			own, theirs = cpuOf(command.Process.Pid), cpuOf(engine...)
		case warmUp + sweeps:
			slices.Sort(took)
			return costs{
				wall:   took[len(took)/2],
				cpu:    (cpuOf(command.Process.Pid) - own) / time.Duration(sweeps),
				engine: (cpuOf(engine...) - theirs) / time.Duration(sweeps),
				peak:   peakOf(command.Process.Pid),
			}
		}
	}
	b.Fatalf("%s ended", command)
	return costs{}
}

// crowd starts n real containers that do nothing.
func crowd(b *testing.B, e *harness.Engine, n int) {
	var group errgroup.Group
	group.SetLimit(4)
	for i := range n {
		name := fmt.Sprintf("dstb-bench-%d", i)
		b.Cleanup(func() { e.Remove(name) })
		group.Go(func() error {
			c, err := e.CreateContainer(docker.CreateContainerOptions{Name: name,
				Config: &docker.Config{Image: e.Image, Cmd: []string{"/busybox", "sleep", "100000"}}})
			if err != nil {
				return err
			}
			return e.StartContainer(c.ID, nil)
		})
	}
	if err := group.Wait(); err != nil {
		b.Fatal(err)
	}
}

// Two thousand containers that take their time need no more open files than there usually are.
func TestFewOpenFiles(t *testing.T) {
	binary, err := exec.LookPath(harness.Program) // see TestMain
	if err != nil {
		t.Fatal(err)
	}
	s := harness.NewStandIn(t)
	address := harness.Crowd(t, 2000, 300*time.Millisecond)
	out, err := exec.Command("sh", "-c", `ulimit -n 1024; exec "$0" "$@"`, binary, "--once",
		"--backstop="+s.URL+"/publish/docker", "--docker="+address).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v %.2000s", err, out)
	}
	if !strings.Contains(s.Lines(), ".metrics.sampled 2000 ") {
		t.Error("not all of them were read")
	}
}

// switchesOf returns how often the threads of a process went to sleep, or were sent to.
func switchesOf(pid int) (switches int) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, thread := range threads {
		text, _ := os.ReadFile(thread)
		for _, m := range regexp.MustCompile(`ctxt_switches:\s+(\d+)`).FindAllSubmatch(text, -1) {
			n, _ := strconv.Atoi(string(m[1]))
			switches += n
		}
	}
	return switches
}

// Between sweeps nothing wakes it up, nor does it ask for anything.
func TestNothingHappensBetweenSweeps(t *testing.T) {
	s := harness.NewStandIn(t)
	daemon := harness.StartDaemon(t, "--backstop="+s.URL+"/publish/docker",
		"--docker="+harness.Crowd(t, 100, 0), "--poll=1h", "--host=h",
		"--spool="+filepath.Join(t.TempDir(), "a", "spool"))
	harness.Must(t, s.Await(`^h\.metrics\.sampled `, 1, time.Minute))
	// What the runtime has to clear up after the sweep is done within seconds. Whatever came once a
	// second would never let it rest.
	const enough = 30
	deadline := time.Now().Add(time.Minute)
	for quiet, before := 0, 0; quiet < enough; <-time.After(100 * time.Millisecond) {
		now := switchesOf(daemon.Process.Pid)
		if quiet++; now != before {
			quiet, before = 0, now
		}
		if now == 0 || time.Now().After(deadline) {
			t.Fatalf("it has no rest: %d context switches", now)
		}
	}
}

// released returns the daemon as it is released, and not with the race detector.
func released(b *testing.B) (binary string) {
	b.Helper()
	binary = filepath.Join(b.TempDir(), harness.Program)
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, ".")
	build.Dir = harness.Top(b)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v %s", err, out)
	}
	return binary
}

// The daemon and the Telegraf that $TELEGRAF names, by turns: 100 real containers, for a Carbon
// that throws everything away.
func BenchmarkBesideTelegraf(b *testing.B) {
	telegraf := os.Getenv("TELEGRAF")
	if telegraf == "" {
		b.Skip("script/bench telegraf makes one")
	}
	e := harness.Usual(b)
	crowd(b, e, 100)
	carbon, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(b, err)
	defer carbon.Close()
	go func() {
		for {
			conn, err := carbon.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(io.Discard, conn)
			}()
		}
	}()
	address := carbon.Addr().String()
	config := filepath.Join(b.TempDir(), "telegraf.conf")
	// Series for each core are left out, as they are here. One write a poll shows when it is over.
	harness.Must(b, os.WriteFile(config, fmt.Appendf(nil, `[agent]
interval = "5s"
flush_interval = "5s"
metric_batch_size = 5000
debug = true
[[inputs.docker]]
endpoint = %q
perdevice_include = []
[[outputs.graphite]]
servers = [%q]
`, e.Address, address), 0o600))
	wrote := regexp.MustCompile(`Wrote batch of (?:[2-9]\d\d|\d{4}) metrics in (\S+)`)
	polled := regexp.MustCompile(`msg=polled .*took=(\S+)`)
	binary := released(b)
	for b.Loop() {
		for range 2 { // the second time counts
			theirs := measure(b, exec.Command(telegraf, "--config", config), 10, wrote, wrote, nil)
			ours := measure(b, exec.Command(binary, "--docker="+e.Address, "--poll=5s", "--verbose",
				"--backstop=carbon://"+address+"/docker"), 10, polled, polled, nil)
			for unit, c := range map[string]costs{"telegraf": theirs, "ours": ours} {
				b.ReportMetric(float64(c.cpu.Microseconds())/1000, unit+"-cpu-ms")
				b.ReportMetric(float64(c.peak)/1024, unit+"-MiB")
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

func BenchmarkAgainstTheFloor(b *testing.B) {
	binary := released(b)
	s := harness.NewStandIn(b)
	s.Set("", harness.AnswerWith(http.StatusOK, "ok"))
	var base costs
	for _, size := range []benchSize{
		{"real-100", 100, 8, "2s", true},
		{"replayed-100", 100, 20, "500ms", false},
		{"replayed-1000", 1000, 8, "2s", false},
		{"replayed-5000", 5000, 4, "6s", false},
	} {
		b.Run(size.name, func(b *testing.B) {
			ours := size.compare(b, binary, "--backstop="+s.URL+"/publish/docker")
			if size.name == "replayed-100" {
				base = ours
			} else if !size.real && base.cpu > 0 {
				each := float64(ours.cpu) / float64(size.n) / (float64(base.cpu) / 100)
				b.ReportMetric(each, "x-per-container")
			}
		})
	}
}

// benchSize is how much there is to sweep, and how often.
type benchSize struct {
	name   string
	n      int
	sweeps int
	poll   string
	real   bool
}

// compare runs the floor and the daemon by turns, reports what they cost, and returns the daemon's
// costs.
func (size benchSize) compare(b *testing.B, binary, backstop string) (ours costs) {
	floorBinary, err := exec.LookPath("floor") // see TestMain
	harness.Must(b, err)
	var address string
	var engine []int
	if size.real {
		e := harness.Usual(b)
		crowd(b, e, size.n)
		address, engine = e.Address, engineProcesses()
	} else {
		address = harness.Crowd(b, size.n, 0)
	}
	options := []string{"--docker=" + address, "--poll=" + size.poll}
	ticked := regexp.MustCompile(`^([0-9.]+ns)$`)
	delivered := regexp.MustCompile(`msg=delivered .*queue.metrics=0`)
	swept := regexp.MustCompile(`msg=polled .*took=(\S+)`)
	var least costs
	var wall, cpu, theirs float64
	for b.Loop() {
		const rounds = 2
		for range rounds {
			command := exec.Command(floorBinary, options...)
			least = measure(b, command, size.sweeps, ticked, ticked, engine)
			command = exec.Command(binary, append(options, backstop, "--verbose")...)
			ours = measure(b, command, size.sweeps, delivered, swept, engine)
			wall += float64(ours.wall) / float64(least.wall) / rounds
			cpu += float64(ours.cpu) / float64(least.cpu) / rounds
			if least.engine > 0 {
				theirs += float64(ours.engine) / float64(least.engine) / rounds
			}
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(least.wall.Milliseconds()), "floor-ms")
	b.ReportMetric(float64(ours.wall.Milliseconds()), "ms")
	b.ReportMetric(wall, "x-wall")
	b.ReportMetric(float64(ours.cpu.Microseconds())/1000, "cpu-ms")
	b.ReportMetric(cpu, "x-cpu")
	b.ReportMetric(float64(ours.peak)/1024, "MiB")
	if size.real {
		b.ReportMetric(theirs, "x-engine")
	}
	return ours
}

// engineProcesses returns the engine on this machine, by the file with its process id, and its
// containerd.
func engineProcesses() (pids []int) {
	for _, file := range []string{"/var/run/docker.pid", "/var/run/docker/containerd/containerd.pid",
		"/run/containerd/containerd.pid"} {
		text, _ := os.ReadFile(file)
		if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// floor is a command of its own, so that its costs can be told from all others: it asks the engine
// for what a sweep asks, at each tick, throws the answers away, and writes how long that took, in
// ns.
func floor() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1) // as the daemon does, and for its reason
	}
	address := flag.String("docker", "", "")
	poll := flag.Duration("poll", time.Second, "")
	flag.Parse()
	e := asking{http.Client{Transport: harness.Transport(*address)}}
	// Without one-shot, an engine answers at its next tick, and all have to be asked at once.
	query, concurrency := "/stats?stream=false", 512
	version := e.ask("/_ping", io.Discard).Get("Api-Version")
	if minor, err := strconv.Atoi(strings.TrimPrefix(version, "1.")); err == nil && minor >= 41 {
		query, concurrency = query+"&one-shot=true", 16
	}
	var body bytes.Buffer
	e.ask("/containers/json", &body)
	var list []struct{ ID string }
	exitOn(json.Unmarshal(body.Bytes(), &list))
	for tick := time.Now(); ; tick = tick.Add(*poll) {
		time.Sleep(time.Until(tick))
		start := time.Now()
		e.ask("/containers/json", io.Discard)
		var wait sync.WaitGroup
		wait.Go(func() { e.ask("/info", io.Discard) })
		var stats errgroup.Group
		stats.SetLimit(concurrency)
		for _, container := range list {
			stats.Go(func() error {
				e.ask("/containers/"+container.ID+query, io.Discard)
				return nil
			})
		}
		stats.Wait()
		wait.Wait()
		fmt.Printf("%dns\n", time.Since(start).Nanoseconds())
	}
}

// asking is a client of an engine that ends the process where there is no answer.
type asking struct{ http.Client }

func (a *asking) ask(path string, into io.Writer) http.Header {
	resp, err := a.Get("http://engine" + path)
	exitOn(err)
	defer resp.Body.Close()
	_, err = io.Copy(into, resp.Body)
	exitOn(err)
	return resp.Header
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
