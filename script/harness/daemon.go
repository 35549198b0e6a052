package harness

import (
	"os"
	"os/exec"
	"testing"
)

// Daemon is the daemon in a process of its own.
type Daemon struct {
	*exec.Cmd
	Log *Log // what it logs

	t testing.TB
}

// NewDaemon returns a daemon that can be started, and is killed at the end of the test. See Built.
func NewDaemon(t testing.TB, options ...string) *Daemon {
	t.Helper()
	d := &Daemon{exec.Command(Program, options...), &Log{}, t}
	d.Stderr = d.Log
	t.Cleanup(func() {
		if d.Process != nil && d.ProcessState == nil {
			d.Process.Kill()
			d.Wait()
		}
	})
	return d
}

// StartDaemon starts one.
func StartDaemon(t testing.TB, options ...string) *Daemon {
	t.Helper()
	d := NewDaemon(t, options...)
	Must(t, d.Start())
	return d
}

// End interrupts the daemon. The test fails if it ends otherwise than it should.
func (d *Daemon) End() {
	d.t.Helper()
	Must(d.t, d.Process.Signal(os.Interrupt))
	if err := d.Wait(); err != nil {
		d.t.Errorf("%v\n%s", err, d.Log)
	}
}
