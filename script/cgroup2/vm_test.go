//go:build linux && vm

// Package cgroup2_test needs the virtual machine of script/test-cgroup2, where the daemon and its
// unit are installed. Its tests change the machine, or need a kernel that counts OOM kills and
// CPUs that nobody else uses.
package cgroup2_test

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	docker "github.com/fsouza/go-dockerclient"
)

// noErrors fails the test if the daemon has logged an error.
func noErrors(t *testing.T, log string) {
	t.Helper()
	if strings.Contains(log, "level=ERROR") {
		t.Errorf("it logged\n%s", log)
	}
}

// follow runs the daemon until the test ends, and returns where its metrics arrive. Nothing may be
// an error.
func follow(t *testing.T, poll string) *harness.StandIn {
	t.Helper()
	s := harness.NewStandIn(t)
	daemon := harness.StartDaemon(t,
		"--backstop="+s.URL+"/publish/docker", "--host=h", "--poll="+poll)
	t.Cleanup(func() {
		daemon.End()
		noErrors(t, daemon.Log.String())
	})
	return s
}

// newest returns the newest value of a metric and how many have arrived. The name is the end of
// the metric's, from a dot on.
func newest(t *testing.T, s *harness.StandIn, name string) (value float64, arrived int) {
	t.Helper()
	last := ""
	for point, text := range s.Points() {
		metric, at, _ := strings.Cut(point, " ")
		if !strings.HasSuffix(metric, name) {
			continue
		}
		if arrived++; at > last { // all times have ten digits
			last = at
			var err error
			value, err = strconv.ParseFloat(text, 64)
			harness.Must(t, err)
		}
	}
	return value, arrived
}

// await waits until the newest value of a metric is at least least, and returns it.
func await(t *testing.T, s *harness.StandIn, name string, least float64) float64 {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		value, arrived := newest(t, s, name)
		if arrived > 0 && value >= least {
			return value
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is %v, not %v, after a minute", name, value, least)
		}
		harness.Must(t, s.Await(regexp.QuoteMeta(name)+" ", arrived+1, time.Minute))
	}
}

// awaitMore waits for more points of a metric.
func awaitMore(t *testing.T, s *harness.StandIn, name string, more int) {
	t.Helper()
	_, arrived := newest(t, s, name)
	harness.Must(t, s.Await(regexp.QuoteMeta(name)+" ", arrived+more, time.Minute))
}

// A process that needs more memory than its container may use is killed, and memory.failcnt rises.
func TestLiveOOMKill(t *testing.T) {
	e := harness.Usual(t)
	s := follow(t, "2s")
	const limit = 32 << 20
	host := docker.HostConfig{Memory: limit, MemorySwap: limit}
	id := e.Run(t, "eats", `until [ -e /eat ]; do /busybox sleep 0.1; done
		/busybox tail /dev/zero # keeps all of this endless line
		exec /busybox sleep 600`, host)
	await(t, s, ".eats.memory.limit", limit)
	before, _ := newest(t, s, ".eats.memory.failcnt")
	e.Exec(t, id, "/busybox", "touch", "/eat")
	await(t, s, ".eats.memory.failcnt", before+1)
	await(t, s, "h.events.oom", 1)

	// A container that is killed as a whole is gone, which is no failure.
	dies := e.Run(t, "dies", "exec /busybox tail /dev/zero", host)
	if status, err := e.WaitContainer(dies); err != nil || status != 137 {
		t.Errorf("it ended with %d %v; 137 is a SIGKILL", status, err)
	}
	await(t, s, "h.events.die_nonzero", 1)
	awaitMore(t, s, "h.metrics.sampled", 2) // one may be of a poll that began before
}

// cpu.percent shows the limit that docker run --cpus sets.
func TestLiveCPUsLimit(t *testing.T) {
	e := harness.Usual(t)
	e.Run(t, "half", "exec /busybox timeout 600 /busybox sh -c 'while :; do :; done'",
		docker.HostConfig{NanoCPUs: 500_000_000})
	s := follow(t, "4s") // 40 periods of the limit
	// The first poll is at the start, the second may be soon after, the third has the whole 4 s.
	// A busy host may take some of it away.
	awaitMore(t, s, ".half.cpu.percent", 2)
	if percent := await(t, s, ".half.cpu.percent", 45); percent > 55 {
		t.Errorf("cpu.percent is %v with --cpus 0.5", percent)
	}
	if limit, _ := newest(t, s, ".half.cpu.limit"); limit != 0.5 {
		t.Errorf("cpu.limit is %v with --cpus 0.5", limit)
	}
	throttled, _ := newest(t, s, ".half.cpu.throttling.throttled_periods")
	if periods, _ := newest(t, s, ".half.cpu.throttling.periods"); throttled == 0 ||
		throttled > periods {
		t.Errorf("%v of %v periods were throttled", throttled, periods)
	}
}

// do runs a command and returns what it prints. If it fails, the test ends.
func do(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s\n%s", name, args, err, out, journal())
	}
	return strings.TrimSpace(string(out))
}

// journal returns what the unit logged.
func journal() string {
	out, _ := exec.Command("journalctl", "-b", "-u", harness.Program).CombinedOutput()
	return string(out)
}

// unitHas checks a property of the unit.
func unitHas(t *testing.T, property, want string) {
	t.Helper()
	show := []string{"show", "--value", "--property=" + property, harness.Program}
	if got := do(t, "systemctl", show...); got != want {
		t.Errorf("%s is %s, not %s", property, got, want)
	}
}

// The unit does not start before it is configured. Then it runs, also while the engine restarts.
func TestLiveUnit(t *testing.T) {
	do(t, "systemd-analyze", "verify", harness.Program+".service")
	do(t, "systemctl", "enable", "--now", harness.Program)
	unitHas(t, "ActiveState", "inactive")
	unitHas(t, "Result", "exec-condition")

	e := harness.Usual(t)
	e.Run(t, "web", "", docker.HostConfig{Memory: 32 << 20})
	s := harness.NewStandIn(t)
	options, err := os.OpenFile("/etc/default/"+harness.Program, os.O_APPEND|os.O_WRONLY, 0)
	harness.Must(t, err)
	fmt.Fprintf(options, "SRV_BACKSTOP='%s/publish/docker'\nSRV_POLL='2s'\nSRV_HOST='h'\n", s.URL)
	harness.Must(t, options.Close())
	do(t, "systemctl", "start", harness.Program)
	unitHas(t, "ActiveState", "active")
	awaitMore(t, s, ".web.cpu.percent", 2)
	if limit, _ := newest(t, s, ".web.memory.limit"); limit != 32<<20 {
		t.Errorf("there arrived\n%s", s.Lines())
	}
	pid := do(t, "systemctl", "show", "--value", "--property=MainPID", harness.Program)
	if uid := do(t, "stat", "--format=%u", "/proc/"+pid); uid == "0" {
		t.Error("it runs as root")
	}

	// The unit allows all that the daemon does.
	noErrors(t, journal())

	// The engine stops, and starts at a new socket. A poll in between may be refused: the socket is
	// root's until systemd gives it to the group.
	do(t, "systemctl", "stop", "docker.service", "docker.socket")
	harness.AwaitText(t, journal, "Docker engine does not answer", 1)
	do(t, "systemctl", "start", "docker.service")
	harness.Must(t, e.StartContainer(e.Name(t, "web"), nil))
	const answers = "Docker engine answers"
	harness.AwaitText(t, journal, answers, 2)
	awaitMore(t, s, ".web.cpu.percent", 2)
	unitHas(t, "MainPID", pid)
	unitHas(t, "NRestarts", "0")

	do(t, "systemctl", "stop", harness.Program)
	unitHas(t, "Result", "success")
	text := journal()
	noErrors(t, text[strings.LastIndex(text, answers):])
}
