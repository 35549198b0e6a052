package main

import (
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// service reports to systemd, if that has started this process, that it is ready and alive, and
// sets the status line of systemctl status. It has no timer of its own: a timer would wake the
// process up between sweeps.
// https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
type service struct {
	send     func(state string) // tellSystemd, but in tests
	queue    *queue
	watchdog time.Duration // timeout of systemd's watchdog, 0: none

	mu     sync.Mutex
	pinged time.Time // when the watchdog was last pinged
	swept  string    // what the last sweep brought
	status string    // the last one sent
}

// newService connects to the systemd that has started this process. If polls are rarer than
// WatchdogSec= in the unit, it asks for a longer timeout.
func newService(poll time.Duration, q *queue) *service {
	s := &service{queue: q, swept: "no poll yet", send: tellSystemd}
	if timeout, err := daemon.SdWatchdogEnabled(false); err == nil && timeout > 0 {
		if s.watchdog = max(timeout, 3*poll); s.watchdog > timeout {
			s.send(fmt.Sprintf("WATCHDOG_USEC=%d", s.watchdog.Microseconds()))
		}
	}
	return s
}

// notifyWithin is how long it waits for a systemd that has crashed, or is frozen.
const notifyWithin = time.Second

// tellSystemd reports a change of state.
func tellSystemd(state string) {
	conn, err := net.DialTimeout("unixgram", os.Getenv("NOTIFY_SOCKET"), notifyWithin)
	if err != nil {
		return // there is nobody to tell
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(notifyWithin))
	_, _ = conn.Write([]byte(state))
}

func (s *service) ready() { s.send(daemon.SdNotifyReady) }

func (s *service) ending() { s.send(daemon.SdNotifyStopping) }

// alive pings the watchdog, at most every eighth of its timeout, unless delivery hangs.
func (s *service) alive() {
	if s.watchdog == 0 || s.queue.hangs() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.pinged) >= s.watchdog/8 {
		s.pinged = now
		s.send(daemon.SdNotifyWatchdog)
	}
}

// hasSwept puts the result of a sweep into the status.
func (s *service) hasSwept(result sweepResult, took time.Duration) {
	s.alive()
	s.mu.Lock()
	s.swept = fmt.Sprintf("last poll: %d containers in %s, %d failed",
		result.running, took.Round(time.Millisecond), result.failed)
	if result.err != nil {
		s.swept = "last poll: " + errorText(result.err)
	}
	s.mu.Unlock()
	s.update()
}

// update sends the status, if it has changed.
func (s *service) update() {
	s.mu.Lock()
	defer s.mu.Unlock()
	status := fit(s.swept+"; queue: "+s.waiting(), maxShown)
	if status != s.status {
		s.status = status
		s.send("STATUS=" + status)
	}
}

// waiting says in a few words what waits in the queue.
func (s *service) waiting() string {
	metrics, _, since, trouble := s.queue.backlog()
	if metrics == 0 {
		return "empty"
	}
	text := fmt.Sprintf("%d metrics", metrics)
	if since != "" {
		text += " since " + since
	}
	if trouble != "" {
		text += ", " + trouble
	}
	return text
}
