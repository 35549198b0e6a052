//go:build linux

package main

import (
	"bufio"
	"cmp"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	docker "github.com/fsouza/go-dockerclient"
	"golang.org/x/sync/errgroup"
)

// What a sweep costs, beside the floor: the same requests to the same engine, with their answers thrown away. script/bench
// shows it.

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

// measure runs a command that sweeps at each tick until it has done so some times, and returns its costs for one sweep. A sweep is over with a line that matches
// over; walls have their duration as first group.
func measure(b *testing.B, command *exec.Cmd, sweeps int, over, walls *regexp.Regexp, engine []int) costs {
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
				wall: took[len(took)/2],
				cpu:  (cpuOf(command.Process.Pid) - own) / time.Duration(sweeps), engine: (cpuOf(engine...) - theirs) / time.Duration(sweeps),
				peak: peakOf(command.Process.Pid),
			}
		}
	}
	b.Fatalf("%s ended", command)
	return costs{}
}

// crowd starts n real containers that do nothing.
func (e *liveEngine) crowd(b *testing.B, n int) {
	var group errgroup.Group
	group.SetLimit(4)
	for i := range n {
		name := fmt.Sprintf("dstb-bench-%d", i)
		b.Cleanup(func() { e.remove(name) })
		group.Go(func() error {
			c, err := e.CreateContainer(docker.CreateContainerOptions{Name: name, Config: &docker.Config{Image: e.image, Cmd: []string{"/busybox", "sleep", "100000"}}})
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

// Five thousand containers that take their time need no more open files than there usually are.
func TestFewOpenFiles(t *testing.T) {
	binary, err := exec.LookPath(program) // see TestMain
	if err != nil {
		t.Fatal(err)
	}
	s := newStandIn(t)
	address := replayCrowd(t, 5000, 300*time.Millisecond)
	out, err := exec.Command("sh", "-c", `ulimit -n 1024; exec "$0" "$@"`, binary, "--once", "--backstop="+s.URL+"/publish/docker", "--docker="+address).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v %.2000s", err, out)
	}
	if !strings.Contains(s.lines(), ".metrics.sampled 5000 ") {
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
	s := newStandIn(t)
	daemon := exec.Command(program, "--backstop="+s.URL+"/publish/docker", "--docker="+replayCrowd(t, 100, 0), "--poll=1h", "--host=h", "--spool="+newDir(t))
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	defer daemon.Wait()
	defer daemon.Process.Kill()
	if err := s.await(`^h\.metrics\.sampled `, 1, time.Minute); err != nil {
		t.Fatal(err)
	}
	// What the runtime has to clear up after the sweep is done within seconds. Whatever came once a second would never let it rest.
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

func BenchmarkAgainstTheFloor(b *testing.B) {
	binary := filepath.Join(b.TempDir(), program)
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v %s", err, out)
	}
	floorBinary, err := exec.LookPath("floor") // see TestMain
	if err != nil {
		b.Fatal(err)
	}
	s := newStandIn(b)
	s.set("", answerWith(http.StatusOK, "ok"))
	var base costs
	for _, size := range []struct {
		name   string
		n      int
		sweeps int
		poll   string
		real   bool
	}{{"real-100", 100, 8, "2s", true}, {"replayed-100", 100, 20, "500ms", false}, {"replayed-1000", 1000, 8, "2s", false}, {"replayed-5000", 5000, 4, "6s", false}} {
		b.Run(size.name, func(b *testing.B) {
			var address string
			var engine []int
			if size.real {
				e := connect(b, cmp.Or(os.Getenv("DOCKER_HOST"), "unix:///var/run/docker.sock"))
				e.crowd(b, size.n)
				address, engine = e.address, engineProcesses()
			} else {
				address = replayCrowd(b, size.n, 0)
			}
			var ours, least costs
			var wall, cpu, theirs float64
			for b.Loop() {
				const rounds = 2
				for range rounds {
					least = measure(b, exec.Command(floorBinary, "--docker="+address, "--poll="+size.poll), size.sweeps,
						regexp.MustCompile(`^[0-9.]+ns$`), regexp.MustCompile(`^([0-9.]+ns)$`), engine)
					ours = measure(b, exec.Command(binary, "--backstop="+s.URL+"/publish/docker", "--docker="+address, "--poll="+size.poll, "--verbose"), size.sweeps,
						regexp.MustCompile(`msg=delivered .*queue.metrics=0`), regexp.MustCompile(`msg=swept .*took=(\S+)`), engine)
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
			if size.name == "replayed-100" {
				base = ours
			} else if !size.real && base.cpu > 0 {
				b.ReportMetric(float64(ours.cpu)/float64(size.n)/(float64(base.cpu)/100), "x-per-container")
			}
		})
	}
}

// engineProcesses returns those of the engine on this machine.
func engineProcesses() (pids []int) {
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		comm, _ := os.ReadFile(name)
		if c := strings.TrimSpace(string(comm)); c == "dockerd" || c == "containerd" {
			pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}
