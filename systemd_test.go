package main

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// A systemd that reads nothing from its socket holds up neither polls nor the end.
func TestSystemdHoldsUpNothing(t *testing.T) {
	if runtime.GOOS != "linux" {
		harness.Cannot(t, "systemd is there on Linux only")
	}
	t.Parallel()
	path := filepath.Join(t.TempDir(), "notify")
	socket, err := net.ListenPacket("unixgram", path)
	harness.Must(t, err)
	defer socket.Close()
	full, err := net.Dial("unixgram", path)
	harness.Must(t, err)
	harness.Must(t, full.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	for err == nil {
		_, err = full.Write([]byte("STATUS=full"))
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the socket is not full: %v", err)
	}
	s := harness.NewStandIn(t)
	daemon := exec.Command(program, "--docker="+harness.NewReplay(t, "cgroup2").URL,
		"--backstop="+s.URL+"/publish/docker", "--poll=10ms")
	daemon.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	harness.Must(t, daemon.Start())
	t.Cleanup(func() { daemon.Process.Kill() })
	awaitDeliveries(t, s)
	interrupt(t, daemon)
}

// Signs of life are given at what happens, and not more often than is of use: a sweep that hangs
// gives none.
func TestSystemdNoticesAHungSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var signs int
		q, _ := (&receiver{}).queue(t)
		s := &service{watchdog: 2 * time.Minute, queue: q.queue,
			send: func(state string) {
				if state == "WATCHDOG=1" {
					signs++
				}
			}}
		for range 10 * 60 { // answers, one a second
			s.alive()
			time.Sleep(time.Second)
		}
		if signs != 10*60/15 {
			t.Errorf("%d signs of life in 10 minutes", signs)
		}
		signs = 0
		// While sweeps go on, but a delivery hangs, there are none.
		q.put(points(0, 1))
		q.next(true)
		for range 20 * 60 {
			s.alive()
			time.Sleep(time.Second)
		}
		if signs > 5*60/15+1 {
			t.Errorf("%d signs of life in 20 minutes with a delivery that hangs", signs)
		}
	})
	// Each answer is one.
	r := harness.NewReplay(t, "cgroup2")
	c, _ := collecting(t, r.URL, time.Minute)
	answers := 0
	c.alive = func() { answers++ }
	c.flow.limit = 1
	if result := c.sweep(t.Context()); answers != result.running || answers == 0 {
		t.Errorf("%d answers of %d containers", answers, result.running)
	}
}

// Without a socket of systemd there is no watchdog, whatever else is set.
func TestNoSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "nonsense")
	if service := newService(time.Second, nil); service.watchdog != 0 {
		t.Errorf("a watchdog of %s, where there is none", service.watchdog)
	}
}
