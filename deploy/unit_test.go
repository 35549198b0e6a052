//go:build unix

package deploy_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// What systemd hears of the daemon, from its start to its end.
func TestSystemdIsTold(t *testing.T) {
	dir, err := os.MkdirTemp("", "dstb") // the path of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "s"),
		Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	socket.SetReadDeadline(time.Now().Add(time.Minute))
	var heard []string
	until := func(pattern string) {
		t.Helper()
		for {
			message := make([]byte, 4<<10)
			n, err := socket.Read(message)
			if err != nil {
				t.Fatalf("%s is not to be heard: %v, only %q", pattern, err, heard)
			}
			heard = append(heard, string(message[:n]))
			if regexp.MustCompile(`^(?:` + pattern + `)$`).Match(message[:n]) {
				return
			}
		}
	}

	engine, s := harness.NewReplay(t, "cgroup2"), harness.NewStandIn(t)
	s.Set("", harness.AnswerWith(503, ""))
	daemon := harness.NewDaemon(t, "--docker="+engine.URL,
		"--backstop="+s.URL+"/publish/docker", "--poll=1s")
	daemon.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket.LocalAddr().String(),
		"WATCHDOG_USEC=2000000")
	harness.Must(t, daemon.Start())
	until("WATCHDOG_USEC=3000000") // three polls, as that is more
	until("READY=1")
	until("WATCHDOG=1")
	until(`STATUS=last poll: \d containers in \d+ms, 0 failed; queue: \d+ metrics since \S+, ` +
		`answer 503 Service Unavailable`)
	s.Set("", nil)
	until(`STATUS=last poll: \d containers in \d+ms, 0 failed; queue: empty`)
	until("WATCHDOG=1")
	engine.On("/containers/json", harness.Hang)
	until(`STATUS=last poll: no answer within 900ms; queue: empty`)
	daemon.End()
	until("STOPPING=1")
}

func TestUnitHasAWatchdog(t *testing.T) {
	unit := harness.ReadFile(t, "deploy/docker-stats-to-backstop.service")
	for _, line := range []string{"Type=notify", "WatchdogSec=2min", "WatchdogSignal=SIGKILL",
		"StateDirectory=" + harness.Program} {
		if !strings.Contains(unit, "\n"+line+"\n") {
			t.Errorf("the unit has no %s", line)
		}
	}
}

// systemd itself reads the unit, and the one in docs/install.md.
func TestSystemdTakesTheUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		harness.Cannot(t, "no systemd-analyze: %v", err)
	}
	binary, err := exec.LookPath(harness.Program) // see TestMain
	if err != nil {
		t.Fatal(err)
	}
	_, short, _ := strings.Cut(harness.Section(t, "docs/install.md", "## As a systemd service"),
		"\n    [Unit]")
	short, _, _ = strings.Cut(short, "\n\nIn an")
	for name, unit := range map[string]string{
		"shipped": harness.ReadFile(t, "deploy/docker-stats-to-backstop.service"),
		"short":   strings.ReplaceAll("[Unit]"+short, "\n    ", "\n"),
	} {
		dir := t.TempDir()
		// It complains of a program that is not there, and a Docker that is not installed.
		file := filepath.Join(dir, harness.Program+".service")
		unit = strings.ReplaceAll(unit, "/usr/bin/"+harness.Program, binary)
		if err := os.WriteFile(file, []byte(unit), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "docker.service"),
			[]byte("[Service]\nExecStart=/bin/true\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		verify := exec.Command("systemd-analyze", "verify", file)
		verify.Env = append(os.Environ(), fmt.Sprintf("SYSTEMD_UNIT_PATH=%s:", dir))
		// What it says of other units, those of this machine, is not our business.
		out, err := verify.CombinedOutput()
		if err != nil || strings.Contains(string(out), harness.Program) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// A mistake in the options ends it for good. A crash, for which Go has the status 2, does not.
func TestUnitRestartsWhatCrashed(t *testing.T) {
	final := harness.AllOf(`(?m)^RestartPreventExitStatus=(.*)$`,
		harness.ReadFile(t, "deploy/docker-stats-to-backstop.service"))
	status := func(daemon *exec.Cmd) string {
		t.Helper()
		_ = daemon.Wait()
		return fmt.Sprint(daemon.ProcessState.ExitCode())
	}
	mistaken := exec.Command(harness.Program, "--poll=never")
	harness.Must(t, mistaken.Start())
	if got := status(mistaken); !slices.Equal(final, []string{got}) {
		t.Errorf("a mistake has the status %s, the unit does not restart after %q", got, final)
	}

	engine := harness.NewReplay(t, "cgroup2")
	crashing := exec.Command(harness.Program, "--docker="+engine.URL, "--poll=1h")
	out, err := crashing.StdoutPipe()
	harness.Must(t, err)
	harness.Must(t, crashing.Start())
	if _, err := out.Read(make([]byte, 1)); err != nil { // its first metric
		t.Fatal(err)
	}
	harness.Must(t, crashing.Process.Signal(syscall.SIGQUIT)) // Go's runtime takes that for a crash
	if got := status(crashing); got != "2" || slices.Contains(final, got) {
		t.Errorf("a crash has the status %s, the unit does not restart after %q", got, final)
	}
}

// A terminal that is closed does not end it.
func TestHangUpIsIgnored(t *testing.T) {
	engine, s := harness.NewReplay(t, "cgroup2"), harness.NewStandIn(t)
	daemon := harness.StartDaemon(t, "--docker="+engine.URL,
		"--backstop="+s.URL+"/publish/docker", "--poll=1s")
	harness.Must(t, s.Await(`\.duration `, 1, time.Minute))
	harness.Must(t, daemon.Process.Signal(syscall.SIGHUP))
	harness.Must(t, s.Await(`\.duration `, 3, time.Minute))
	daemon.End()
}
