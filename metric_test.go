package main

import (
	"encoding/json"
	"math"
	"testing"
)

func TestMetricOnTheWire(t *testing.T) {
	m := metric{"web.cpu.total", whole(math.MaxUint64), 1795409680}
	if got, want := string(m.appendLine(nil)), "web.cpu.total 18446744073709551615 1795409680\n"; got != want {
		t.Errorf("plaintext: %q, want %q", got, want)
	}
	p, _ := decimal(12.5)
	body := encode([]metric{m, {"web.cpu.percent", p, 1795409681}})
	if want := `[{"metric":"web.cpu.total","value":18446744073709551615,"measure_time":1795409680},{"metric":"web.cpu.percent","value":12.5,"measure_time":1795409681}]`; string(body) != want || !json.Valid(body) {
		t.Errorf("JSON: %s, want %s", body, want)
	}
	if got := string(encode(nil)); got != "[]" {
		t.Errorf("JSON of nothing: %s", got)
	}
}

func TestDecimals(t *testing.T) {
	for f, want := range map[float64]string{
		0: "0", 1: "1", 0.0004: "0", 0.0005: "0.001", 0.001: "0.001", 0.01: "0.01", 0.1: "0.1", 29.9199: "29.92",
		99.9996: "100", 1234567.8901: "1234567.89", 1e12: "1000000000000",
	} {
		v, ok := decimal(f)
		if got := string(v.append(nil)); !ok || got != want {
			t.Errorf("%v: %s %t, want %s", f, got, ok, want)
		}
	}
	for _, f := range []float64{-1, math.NaN(), math.Inf(1), math.Inf(-1), 1e300} {
		if v, ok := decimal(f); ok {
			t.Errorf("%v was taken as %s", f, v.append(nil))
		}
	}
}
