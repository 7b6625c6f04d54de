package instance

import (
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd"
	"github.com/nydusfs/nydus-snapshotter/pkg/nydusd/logs"
)

// LogOrigin tells about whoever writes the log of an instance; ok is false when
// there is none any more. The generation is told when only one can write.
func LogOrigin(runDir, key string) (o logs.Origin, ok bool) {
	rec, err := ReadRecord(runDir, key)
	if err != nil {
		return logs.Origin{}, false
	}
	o.Image = rec.Image
	all := rec.Generations()
	if len(all) == 1 {
		o.Generation = all[0].Number
	}
	for _, g := range all {
		// One that is gone wrote nothing lately.
		for _, path := range ConfigPaths(runDir, key, g) {
			if config, err := readFile(path); err == nil {
				o.Secrets = append(o.Secrets, nydusd.Secrets(string(config))...)
			}
		}
	}
	return o, len(all) > 0
}
