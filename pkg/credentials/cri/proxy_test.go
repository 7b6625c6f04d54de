package cri

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// backend is a CRI whose answers are known; test/e2e has containerd's.
type backend struct {
	runtime.UnimplementedImageServiceServer
	runtime.UnimplementedRuntimeServiceServer
	// pull answers PullImage.
	pull func(ctx context.Context, r *runtime.PullImageRequest) error
	mu   sync.Mutex
	seen metadata.MD
}

func (b *backend) PullImage(ctx context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	b.mu.Lock()
	b.seen = md
	b.mu.Unlock()
	if err := grpc.SetHeader(ctx, metadata.Pairs("x-header", "pull")); err != nil {
		return nil, err
	}
	if err := b.pull(ctx, r); err != nil {
		return nil, err
	}
	return &runtime.PullImageResponse{ImageRef: r.Image.Image}, nil
}

func (b *backend) ListImages(ctx context.Context, r *runtime.ListImagesRequest) (*runtime.ListImagesResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	b.mu.Lock()
	b.seen = md
	b.mu.Unlock()
	if err := grpc.SetHeader(ctx, metadata.Pairs("x-header", "list")); err != nil {
		return nil, err
	}
	if err := grpc.SetTrailer(ctx, metadata.Pairs("x-trailer", "end")); err != nil {
		return nil, err
	}
	response := &runtime.ListImagesResponse{Images: []*runtime.Image{{Id: r.GetFilter().GetImage().GetImage()}}}
	// A member that nobody knows yet comes back as it went.
	response.ProtoReflect().SetUnknown(r.ProtoReflect().GetUnknown())
	return response, nil
}

func (b *backend) StreamImages(_ *runtime.StreamImagesRequest, s grpc.ServerStreamingServer[runtime.StreamImagesResponse]) error {
	for i := range 100 {
		if err := s.Send(&runtime.StreamImagesResponse{Images: []*runtime.Image{{Id: fmt.Sprint(i)}}}); err != nil {
			return err
		}
	}
	return nil
}

func (b *backend) GetContainerEvents(_ *runtime.GetEventsRequest, s grpc.ServerStreamingServer[runtime.ContainerEventResponse]) error {
	if err := s.Send(&runtime.ContainerEventResponse{ContainerId: "c"}); err != nil {
		return err
	}
	<-s.Context().Done() // as long as the caller is there
	return s.Context().Err()
}

func (b *backend) Version(context.Context, *runtime.VersionRequest) (*runtime.VersionResponse, error) {
	return &runtime.VersionResponse{RuntimeName: "behind"}, nil
}

func (b *backend) RemoveImage(context.Context, *runtime.RemoveImageRequest) (*runtime.RemoveImageResponse, error) {
	s, err := status.New(codes.NotFound, "no such image").WithDetails(&runtime.ImageSpec{Image: "detail"})
	if err != nil {
		return nil, err
	}
	return nil, s.Err()
}

// through starts a proxy before b and returns a connection to it.
func through(t *testing.T, b *backend) (*grpc.ClientConn, *Store) {
	t.Helper()
	dir := memory(t)
	store := OpenStore(filepath.Join(dir, "pulls"), nil)
	if err := store.Setup(); err != nil {
		t.Fatal(err)
	}
	behind := grpc.NewServer()
	runtime.RegisterImageServiceServer(behind, b)
	runtime.RegisterRuntimeServiceServer(behind, b)
	serve(t, behind, filepath.Join(dir, "behind.sock"))
	p, err := NewProxy(filepath.Join(dir, "behind.sock"), store, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	serve(t, p.Server(), filepath.Join(dir, "front.sock"))
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "front.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, store
}

func serve(t *testing.T, s *grpc.Server, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// Whatever is called passes: messages with what nobody knows, metadata both ways,
// errors with details, streams, other services.
func TestProxyPasses(t *testing.T) {
	b := &backend{}
	conn, _ := through(t, b)
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "x-from", "kubelet"), time.Minute)
	defer cancel()
	images := runtime.NewImageServiceClient(conn)

	request := &runtime.ListImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: strings.Repeat("x", 1<<20)}}}
	unknown := protowire.AppendString(protowire.AppendTag(nil, 777, protowire.BytesType), "new")
	request.ProtoReflect().SetUnknown(unknown)
	var header, trailer metadata.MD
	list, err := images.ListImages(ctx, request, grpc.Header(&header), grpc.Trailer(&trailer))
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Images) != 1 || len(list.Images[0].Id) != 1<<20 || string(list.ProtoReflect().GetUnknown()) != string(unknown) {
		t.Error("the message is another one")
	}
	b.mu.Lock()
	seen := b.seen
	b.mu.Unlock()
	if header.Get("x-header")[0] != "list" || trailer.Get("x-trailer")[0] != "end" || len(seen.Get("x-from")) != 1 {
		t.Errorf("metadata: %v %v %v", header, trailer, seen)
	}

	_, err = images.RemoveImage(ctx, &runtime.RemoveImageRequest{})
	s := status.Convert(err)
	if s.Code() != codes.NotFound || s.Message() != "no such image" || len(s.Details()) != 1 {
		t.Errorf("%v with %v", err, s.Details())
	}
	if _, err := images.ImageStatus(ctx, &runtime.ImageStatusRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("%v", err)
	}
	if v, err := runtime.NewRuntimeServiceClient(conn).Version(ctx, &runtime.VersionRequest{}); err != nil || v.RuntimeName != "behind" {
		t.Errorf("%v, %v", v, err)
	}
	stream, err := images.StreamImages(ctx, &runtime.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		part, err := stream.Recv()
		if err != nil || part.Images[0].Id != fmt.Sprint(i) {
			t.Fatalf("%d: %v, %v", i, part, err)
		}
	}
	if _, err := stream.Recv(); err == nil {
		t.Error("the stream does not end")
	}
	watching, leave := context.WithCancel(ctx)
	events, err := runtime.NewRuntimeServiceClient(conn).GetContainerEvents(watching, &runtime.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := events.Recv(); err != nil || e.ContainerId != "c" {
		t.Errorf("%v, %v", e, err)
	}
	leave()
	if _, err := events.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("%v", err)
	}
}

// Credentials are known while the pull runs, and stay unless they are refused.
func TestProxyKeepsCredentials(t *testing.T) {
	b := &backend{}
	conn, store := through(t, b)
	images := runtime.NewImageServiceClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	pull := func(user string, answer error) error {
		t.Helper()
		b.pull = func(_ context.Context, r *runtime.PullImageRequest) error {
			if r.Auth.GetUsername() != user || r.Auth.GetPassword() != "p" || r.SandboxConfig.GetMetadata().GetName() != "pod" {
				t.Errorf("another request arrives: %s", r.Auth.GetUsername())
			}
			if got := users(t, store, "r.example", "a"); !strings.Contains(got, user) {
				t.Errorf("within the pull: %q", got)
			}
			return answer
		}
		var header metadata.MD
		_, err := images.PullImage(ctx, &runtime.PullImageRequest{
			Image: &runtime.ImageSpec{Image: "r.example/a:1"}, Auth: &runtime.AuthConfig{Username: user, Password: "p"},
			SandboxConfig: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "pod"}},
		}, grpc.Header(&header))
		if len(header.Get("x-header")) != 1 {
			t.Errorf("header: %v", header)
		}
		return err
	}
	want := func(text string) {
		t.Helper()
		if got := users(t, store, "r.example", "a"); got != text {
			t.Errorf("got %q, want %q", got, text)
		}
	}
	if err := pull("wrong", status.Error(codes.Unknown, "failed to pull: unexpected status from HEAD request: 401 Unauthorized")); status.Code(err) != codes.Unknown || !strings.Contains(err.Error(), "401 Unauthorized") {
		t.Errorf("%v", err)
	}
	want("")
	if err := pull("good", nil); err != nil {
		t.Error(err)
	}
	want("good")
	if err := pull("denied", status.Error(codes.PermissionDenied, "no")); err == nil {
		t.Error("no error")
	}
	want("good")
	if err := pull("unlucky", status.Error(codes.Unavailable, "the disk is full")); err == nil {
		t.Error("no error")
	}
	want("good,unlucky")
}

// Without containerd a pull fails as it would without us, and the next one works.
func TestProxyWithoutContainerd(t *testing.T) {
	dir := memory(t)
	store := OpenStore(filepath.Join(dir, "pulls"), nil)
	if err := store.Setup(); err != nil {
		t.Fatal(err)
	}
	p, err := NewProxy(filepath.Join(dir, "behind.sock"), store, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	serve(t, p.Server(), filepath.Join(dir, "front.sock"))
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "front.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	images := runtime.NewImageServiceClient(conn)
	if _, err := images.ListImages(t.Context(), &runtime.ListImagesRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
	if _, err := images.PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "r.example/a"}}); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
	b := &backend{}
	behind := grpc.NewServer()
	runtime.RegisterImageServiceServer(behind, b)
	serve(t, behind, filepath.Join(dir, "behind.sock"))
	if _, err := images.ListImages(t.Context(), &runtime.ListImagesRequest{}, grpc.WaitForReady(true)); err != nil && status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p.backend.ResetConnectBackoff()
	p.backend.Connect()
	for state := p.backend.GetState(); state.String() != "READY"; state = p.backend.GetState() {
		if !p.backend.WaitForStateChange(ctx, state) {
			t.Fatalf("no connection: %v", state)
		}
	}
	if _, err := images.ListImages(ctx, &runtime.ListImagesRequest{}); err != nil {
		t.Errorf("%v", err)
	}
}
