// Package deploy_test holds what is deployed to what the daemon does: dashboards, image, unit,
// Compose, Swarm, and the proxy before the engine.
package deploy_test

import (
	"os"
	"testing"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Built{M: m}.Run()) }
