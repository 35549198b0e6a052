package main

import (
	"fmt"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// service tells systemd how it goes, where that has started us: that we are ready, that we are alive, and what is in the status
// line of systemctl status. It is told at what happens anyway, so that nothing of ours happens between sweeps.
// https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
type service struct {
	send     func(state string)
	queue    func() string // what is in the queue
	watchdog time.Duration // how long systemd waits for a sign of life, 0 for ever

	mu     sync.Mutex
	sign   time.Time // when the last sign of life was given
	swept  string    // what the last sweep brought
	status string    // what was told last
}

// newService returns what tells the systemd that has started us. Its patience, WatchdogSec= in the unit, is
// made longer where polls are rarer.
func newService(poll time.Duration, queue func() string) *service {
	s := &service{queue: queue, swept: "no sweep yet", send: func(state string) {
		_, _ = daemon.SdNotify(false, state) // there is nobody else to tell
	}}
	if patience, err := daemon.SdWatchdogEnabled(false); err == nil && patience > 0 {
		if s.watchdog = max(patience, 3*poll); s.watchdog > patience {
			s.send(fmt.Sprintf("WATCHDOG_USEC=%d", s.watchdog.Microseconds()))
		}
	}
	return s
}

// ready tells that we are.
func (s *service) ready() { s.send(daemon.SdNotifyReady) }

// ending tells that we end.
func (s *service) ending() { s.send(daemon.SdNotifyStopping) }

// alive gives a sign of life, if the last was a while ago. It may be called often.
func (s *service) alive() {
	if s.watchdog == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.sign) >= s.watchdog/8 {
		s.sign = now
		s.send(daemon.SdNotifyWatchdog)
	}
}

// hasSwept tells what a sweep brought.
func (s *service) hasSwept(result sweepResult, took time.Duration) {
	s.alive()
	s.mu.Lock()
	s.swept = fmt.Sprintf("last sweep: %d containers in %s, %d failed", result.running, took.Round(time.Millisecond), result.failed)
	if result.err != nil {
		s.swept = "last sweep: " + errorText(result.err)
	}
	s.mu.Unlock()
	s.update()
}

// update tells what is in the queue now.
func (s *service) update() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if status := s.swept + "; queue: " + s.queue(); status != s.status {
		s.status = status
		s.send("STATUS=" + status)
	}
}
