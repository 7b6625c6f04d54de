package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// maxMessage bounds a message, as four times what kubelet and containerd take.
	maxMessage = 64 << 20
	// maxReconnect bounds how long containerd is away for us after it came back.
	maxReconnect   = 2 * time.Second
	connectTimeout = 5 * time.Second
)

// Proxy passes CRI's calls on to containerd.
type Proxy struct {
	store   *Store
	backend *grpc.ClientConn
	log     *slog.Logger
}

// NewProxy returns a Proxy to the socket at which containerd serves CRI. It need not
// be there yet.
func NewProxy(socket string, store *Store, log *slog.Logger) (*Proxy, error) {
	again := backoff.DefaultConfig
	again.MaxDelay = maxReconnect
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: again, MinConnectTimeout: connectTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("connect to CRI at %s: %w", socket, err)
	}
	return &Proxy{store, conn, log}, nil
}

// Close ends the connection to containerd.
func (p *Proxy) Close() error { return p.backend.Close() }

// Server returns a server with all calls. Who serves it decides who may call.
func (p *Proxy) Server() *grpc.Server {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2(proto.Name)}), grpc.UnknownServiceHandler(p.pass))
	// Methods that it does not have are passed on like unknown services.
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: runtime.ImageService_ServiceDesc.ServiceName, HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "PullImage", Handler: p.pullImage}},
	}, p)
	return s
}

// frame is a message that nobody looks into.
type frame struct{ data mem.BufferSlice }

// codec leaves frames as they are.
type codec struct{ encoding.CodecV2 }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frame); ok {
		f.data.Ref() // the transport lets go of it, and so do we
		return f.data, nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*frame); ok {
		data.Ref() // or it would be used again for the next one
		f.data = data
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

// outgoing has what came with a call go on with it.
func outgoing(ctx context.Context) context.Context {
	md, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		return ctx
	}
	md = md.Copy()
	for name := range md {
		// gRPC makes these itself.
		if strings.HasPrefix(name, ":") || strings.HasPrefix(name, "grpc-") || name == "content-type" || name == "user-agent" {
			delete(md, name)
		}
	}
	return metadata.NewOutgoingContext(ctx, md)
}

// pass passes on any call, a stream in both directions.
func (p *Proxy) pass(_ any, from grpc.ServerStream) error {
	method, ok := grpc.MethodFromServerStream(from)
	if !ok {
		return status.Error(codes.Internal, "a call without a method")
	}
	ctx, cancel := context.WithCancel(outgoing(from.Context()))
	defer cancel()
	to, err := p.backend.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method,
		grpc.ForceCodecV2(codec{encoding.GetCodecV2(proto.Name)}))
	if err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() { sent <- forward(from, to) }()
	received := make(chan error, 1)
	go func() { received <- back(to, from) }()
	for {
		select {
		case err := <-sent:
			if err != nil {
				cancel()
				return status.Errorf(codes.Canceled, "the caller went away: %v", errors.Join(err, <-received))
			}
			sent = nil // all was sent; the answer ends it
		case err := <-received:
			from.SetTrailer(to.Trailer())
			return err
		}
	}
}

// forward sends on what the caller sends, until it has ended.
func forward(from grpc.ServerStream, to grpc.ClientStream) error {
	for {
		f := &frame{}
		err := from.RecvMsg(f)
		if errors.Is(err, io.EOF) {
			return to.CloseSend()
		}
		if err != nil {
			return err
		}
		err = to.SendMsg(f)
		f.data.Free()
		if err != nil {
			return nil // the other direction knows why
		}
	}
}

// back sends back what containerd answers, and returns how it ends.
func back(to grpc.ClientStream, from grpc.ServerStream) error {
	header, err := to.Header()
	if err != nil {
		return err
	}
	if err := from.SendHeader(header); err != nil {
		return err
	}
	for {
		f := &frame{}
		err := to.RecvMsg(f)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		err = from.SendMsg(f)
		f.data.Free()
		if err != nil {
			return err
		}
	}
}

// pullImage keeps the credentials, and passes the pull on.
//
//nolint:revive // the order of the arguments is gRPC's
func (p *Proxy) pullImage(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	request := &runtime.PullImageRequest{}
	if err := decode(request); err != nil {
		return nil, err
	}
	to, with, ok := loginOf(request)
	if ok {
		p.note(to, p.store.add(to.host, to.repository, with))
	}
	response := &runtime.PullImageResponse{}
	var header, trailer metadata.MD
	err := p.backend.Invoke(outgoing(ctx), runtime.ImageService_PullImage_FullMethodName, request, response, grpc.Header(&header), grpc.Trailer(&trailer))
	if ok {
		switch {
		case err == nil:
			with.Proven = true
			p.note(to, p.store.add(to.host, to.repository, with))
		case refused(err):
			p.note(to, p.store.refuse(to.host, to.repository, with))
		}
	}
	if sent := errors.Join(grpc.SetHeader(ctx, header), grpc.SetTrailer(ctx, trailer)); sent != nil {
		p.log.Debug("metadata of a pull is lost", "error", sent)
	}
	if err != nil {
		return nil, err
	}
	return response, nil
}

// note says that credentials could not be kept. The pull goes on: kubelet's image is
// worth more.
func (p *Proxy) note(to target, err error) {
	if err != nil {
		p.log.Error("kubelet's credentials are not kept; a nydus image may not be readable", "event", "credentials", "image", to.host+"/"+to.repository, "error", err)
	}
}

// refused tells whether a registry did not accept the credentials. containerd says so
// by a code, by the status of the answer, or by its authorizer's words.
func refused(err error) bool {
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied:
		return true
	}
	text := status.Convert(err).Message()
	for _, sign := range []string{"401 Unauthorized", "403 Forbidden", "authorization failed", "pull access denied", "insufficient_scope"} {
		if strings.Contains(text, sign) {
			return true
		}
	}
	return false
}
