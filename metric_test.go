package main

import (
	"encoding/json"
	"math"
	"testing"
)

func TestMetricOnTheWire(t *testing.T) {
	m := metric{"web.cpu.total", math.MaxUint64, 1795409680}
	if got, want := string(m.appendLine(nil)), "web.cpu.total 18446744073709551615 1795409680\n"; got != want {
		t.Errorf("plaintext: %q, want %q", got, want)
	}
	body, err := json.Marshal([]metric{m})
	if err != nil {
		t.Fatal(err)
	}
	if want := `[{"metric":"web.cpu.total","value":18446744073709551615,"measure_time":1795409680}]`; string(body) != want {
		t.Errorf("JSON: %s, want %s", body, want)
	}
}
